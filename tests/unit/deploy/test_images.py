"""The Dockerfiles and the compose file, read as text: no container engine runs here."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import central.settings
import edge_node.settings
from tests.unit.deploy.charts import CHARTS, ROOT, VARIANTS, container, render

IMAGES = ROOT / "deploy" / "images"
PROGRAM = {"central": "central", "edge-node-cpu": "edge-node", "edge-node-gpu": "edge-node"}
LOCK = {"central": "central.lock", "edge-node-cpu": "node-cpu.lock", "edge-node-gpu": "gpu.lock"}
SETTINGS = {"central": central.settings, "edge-node": edge_node.settings}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, argument) pairs; comments dropped and continued lines joined."""
    lines = [
        line
        for line in (IMAGES / f"{image}.Dockerfile").read_text().splitlines()
        if not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name, argument.strip()) for name, _, argument in pairs]


def final_stage(image: str) -> list[tuple[str, str]]:
    steps = instructions(image)
    return steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]


def load(program: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return SETTINGS[program].load_settings()


def test_every_dockerfile_is_checked() -> None:
    assert {path.name.removesuffix(".Dockerfile") for path in IMAGES.iterdir()} == set(PROGRAM)


@pytest.mark.parametrize("image", PROGRAM)
def test_every_stage_is_from_one_pinned_base(image: str) -> None:
    bases = [argument.split(" AS ")[0] for name, argument in instructions(image) if name == "FROM"]
    assert bases.pop(1) == "dependencies"
    assert len(bases) == 2
    assert len(set(bases)) == 1, (
        "an environment built on another base image may not run on this one"
    )
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", bases[0]), bases[0]


@pytest.mark.parametrize("image", PROGRAM)
def test_only_pinned_packages_go_in(image: str) -> None:
    steps = [
        argument for name, argument in instructions(image) if name == "RUN" and "/pip " in argument
    ]
    locked, wheel, ours = steps
    assert f"-r requirements/{LOCK[image]}" in locked
    assert all("--no-deps" in step and "--no-cache-dir" in step for step in steps)
    assert "pip wheel" in wheel
    assert "--no-build-isolation" in wheel
    assert "--no-index" in ours
    lock = (ROOT / "requirements" / LOCK[image]).read_text()
    assert "setuptools==" in lock
    assert all(re.fullmatch(r"[a-z0-9.-]+==\S+", line) for line in lock.splitlines())


@pytest.mark.parametrize("image", PROGRAM)
def test_what_is_copied_exists_and_reaches_the_builder(image: str) -> None:
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for argument in (argument for name, argument in instructions(image) if name == "COPY"):
        if "--from=" in argument:
            continue
        for source in argument.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(Path(source).match(pattern) for pattern in kept), (
                f"{source} is not in .dockerignore's exceptions"
            )


@pytest.mark.parametrize("image", PROGRAM)
def test_the_process_is_the_charts_and_not_root(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = final_stage(image)
    said = dict(steps)
    program = PROGRAM[image]
    assert yaml.safe_load(said["CMD"]) == [program, "serve"]
    assert yaml.safe_load(said["ENTRYPOINT"]) == ["tini", "--"]
    assert any(name == "RUN" and " tini " in argument for name, argument in steps)
    user = yaml.safe_load((CHARTS / program / "values.yaml").read_text())["securityContext"]
    assert said["USER"] == f"{user['runAsUser']}:{user['runAsGroup']}"
    assert [name for name, _ in steps].index("USER") < [name for name, _ in steps].index("CMD")
    environment = dict(pair.split("=", 1) for pair in shlex.split(said["ENV"]))
    prefix = SETTINGS[program].PREFIX
    settings = load(
        program, {k: v for k, v in environment.items() if k.startswith(prefix)}, monkeypatch
    )
    listening = settings.listen if program == "central" else settings.serving
    ports = [listening.port, *([listening.enrollment_port] if program == "central" else [])]
    assert said["EXPOSE"].split() == [str(port) for port in ports]
    assert str(settings.data_dir) == said["VOLUME"] == "/data"
    assert listening.host == "0.0.0.0"


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
def test_the_charts_name_images_that_we_build(chart: str, value_file: str | None) -> None:
    repository, _, tag = container(render(chart, value_file))["image"].rpartition(":")
    assert repository.removeprefix("lorikeet/") in PROGRAM
    assert tag == VERSION
    chart_file = yaml.safe_load((CHARTS / chart / "Chart.yaml").read_text())
    assert (chart_file["version"], chart_file["appVersion"]) == (VERSION, VERSION)


@pytest.mark.parametrize("image", PROGRAM)
def test_a_change_of_our_code_ships_a_small_layer(image: str) -> None:
    """Nothing of the checkout but the lock goes in before the layer of dependencies."""
    steps = instructions(image)
    stage = steps[: [name for name, _ in steps].index("FROM", 1)]
    assert [argument.split()[0] for name, argument in stage if name == "COPY"] == [
        f"requirements/{LOCK[image]}"
    ]
    copies = [argument for name, argument in final_stage(image) if name == "COPY"]
    assert copies == [
        "--from=dependencies /opt/lorikeet /opt/lorikeet",
        "--from=wheel /wheels /wheels",
    ]


@pytest.mark.parametrize(
    "tool", ["pytest", "hypothesis", "mypy", "ruff", "moto", "helm-python-sdk", "matplotlib"]
)
@pytest.mark.parametrize("lock", ["central.lock", "node-cpu.lock"])
def test_no_tool_of_the_tests_is_in_an_image(lock: str, tool: str) -> None:
    assert f"\n{tool}==" not in (ROOT / "requirements" / lock).read_text()


@pytest.mark.parametrize("name", ["central", "gpu", "node-cpu"])
def test_locks_agree_with_the_tested_one(name: str) -> None:
    """The images hold what the tests ran, except where CPU and GPU builds differ on purpose."""
    read = [
        dict(
            line.split("==")
            for line in (ROOT / "requirements" / f"{lock}.lock").read_text().split()
        )
        for lock in (name, "cpu")
    ]
    differing = {
        package
        for package in read[0].keys() & read[1].keys()
        if read[0][package] != read[1][package]
    }
    # The CUDA builds of torch and vLLM ask for these themselves.
    assert differing <= {"apache-tvm-ffi", "setuptools", "torch", "triton"}


def test_compose_starts_the_same_programs_with_accepted_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())[
        "services"
    ]
    assert set(services) == {"central", "edge-node"}
    for program, service in services.items():
        assert service["command"] == [program, "serve"]
        image, _, tag = service["image"].rpartition(":")
        assert (image.removeprefix("lorikeet/") in PROGRAM, tag) == (True, VERSION)
        dockerfile = ROOT / service["build"]["dockerfile"]
        assert dockerfile.is_file()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        prefix = SETTINGS[program].PREFIX
        settings = load(
            program,
            {k: v for k, v in service["environment"].items() if k.startswith(prefix)},
            monkeypatch,
        )
        assert str(settings.data_dir) == "/data"
        assert service["volumes"][0].endswith(":/data")
    assert "central" in central.settings.load_settings().listen.names
    edge = edge_node.settings.load_settings()
    own = central.settings.load_settings().listen
    assert (edge.central.address, edge.central.enrollment_address) == (
        f"central:{own.port}",
        f"central:{own.enrollment_port}",
    )
