"""Builds our images and runs them as the charts do, without a container daemon or a registry.

In: a Dockerfile of deploy/images. Out: an image in podman's store; containers with the charts'
security context, in a network of their own that has loopback only. Needs root, buildah, podman,
runc and mmdebstrap (Debian packages).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "docker.io/library/python:3.11.13-slim-bookworm"
"""The base image of our Dockerfiles; Debian's own Python 3.11 stands in for it here."""
TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def what_is_missing() -> str | None:
    """Why no image can be built here; None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return None if os.geteuid() == 0 else "images are built by root here"


@dataclass(frozen=True)
class Engine:
    """folder: scratch space; its `containers.conf` and `pip.conf` are ours."""

    folder: Path

    def run(self, *command: str, timeout_s: float = 900, check: bool = True) -> str:
        """Standard output of `command`; raises AssertionError with its errors."""
        environment = os.environ | {"CONTAINERS_CONF": str(self.folder / "containers.conf")}
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=ROOT,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
        return done.stdout.strip()

    def prepare(self) -> None:
        """The configuration, and the base image when podman has none of its name."""
        (self.folder / "containers.conf").write_text(CONTAINERS_CONF)
        (self.folder / "pip.conf").write_text(f"[global]\n{self._pip_settings()}")
        try:
            self.run("podman", "image", "exists", BASE)
        except AssertionError:
            self._make_base()

    def build(self, image: str, source: Path) -> str:
        """Builds deploy/images/`image`.Dockerfile from `source`; returns the image's name."""
        name = f"localhost/lorikeet-test/{image}:test"
        mounts = [f"{self.folder / 'pip.conf'}:/etc/pip.conf:ro"]
        mounts += [f"{path}:{path}:ro" for path in self._local_paths()]
        self.run(
            "buildah", "build", "--layers", "--network", "host", "--isolation", "chroot",
            *(part for mount in mounts for part in ("-v", mount)),
            "-f", str(source / "deploy" / "images" / f"{image}.Dockerfile"),
            "-t", name, str(source), timeout_s=1500,
        )  # fmt: skip
        return name

    def layers(self, image: str) -> list[str]:
        """Digests of the image's layers, the lowest first."""
        return self.run(
            "podman", "inspect", image, "--format", "{{range .RootFS.Layers}}{{.}} {{end}}"
        ).split()

    def start(
        self,
        image: str,
        environment: Mapping[str, str],
        volumes: Mapping[Path, str],
        command: Sequence[str] = (),
    ) -> str:
        """A container locked down as in the charts; volumes: host directory -> mount. Its id."""
        return self.run(
            "podman", "run", "--detach", "--network", "none", "--read-only", "--cap-drop", "all",
            "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:rw,exec,mode=1777",
            *(part for name, value in environment.items() for part in ("--env", f"{name}={value}")),
            *(part for path, mount in volumes.items() for part in ("--volume", f"{path}:{mount}")),
            image, *command,
        )  # fmt: skip

    def exec(self, container: str, *command: str) -> str:
        return self.run("podman", "exec", container, *command)

    def state(self, container: str) -> tuple[bool, int]:
        """(is it running, its exit code)."""
        running, code = self.run(
            "podman", "inspect", container, "--format", "{{.State.Running}} {{.State.ExitCode}}"
        ).split()
        return running == "true", int(code)

    def logs(self, container: str) -> str:
        done = subprocess.run(
            ["podman", "logs", container], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def remove(self, container: str) -> None:
        self.run("podman", "rm", "--force", "--time", "0", container, check=False)

    def _make_base(self) -> None:
        sources = [str(path) for path in Path("/etc/apt/sources.list.d").glob("debian.sources")]
        python = "python3,python3-venv,python3-pip,python3-dev,python-is-python3"
        archive = self.folder / "base.tar"
        self.run(
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={python},ca-certificates,netbase,tzdata",
            "bookworm",
            str(archive),
            *sources,
        )
        self.run("podman", "import", "--change", 'CMD ["python3"]', str(archive), BASE)
        archive.unlink()

    def _pip_settings(self) -> str:
        """pip's settings of this machine: the build finds the packages that the tests use."""
        lines = self.run("python3", "-m", "pip", "config", "list").splitlines()
        wanted = {}
        for line in lines:
            name, _, value = line.partition("=")
            if name.rpartition(".")[2] in ("cert", "find-links", "index-url", "extra-index-url"):
                wanted[name.rpartition(".")[2]] = value.strip("'\"")
        return "".join(f"{name} = {value}\n" for name, value in wanted.items())

    def _local_paths(self) -> list[str]:
        """Host paths that those settings name."""
        words = (self.folder / "pip.conf").read_text().replace("file://", "").split()
        names = [word.removesuffix("/simple") for word in words if word.startswith("/")]
        return sorted({name for name in names if Path(name).exists()})
