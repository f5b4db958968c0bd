"""`python -m examples.simulation.run`: the simulation with one command, on a SuperLink of its own.

In: number of virtual nodes, run config. Out: what README.md says, in a folder; exit code 0 only
when all rounds were done. Starts `flower-superlink` on free ports with its home in that folder,
hands it `flwr run`, shows the lines of our ServerApp, and stops it. Nothing leaves the machine:
Flower's and Ray's reports of use and the update check are off, and nothing is installed at run
time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil  # type: ignore[import-untyped]

from examples.ports import free_port
from examples.quickstart.model import build_base
from examples.simulation.config import CACHE

REPOSITORY = Path(__file__).resolve().parents[2]
APP = Path(__file__).resolve().parent
INSTALL = "pip install --no-deps -r requirements/simulation.lock"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
SAMPLE_S = 3.0
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""Nothing is reported, downloaded or installed; and Ray has time to start on a busy machine."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("ray") is None:
        print(
            f"simulation: Ray is not installed; Flower's simulation runs on it. Next: {INSTALL}",
            file=sys.stderr,
        )
        return 2
    folder: Path = options.folder.absolute()
    if folder.exists() and not (folder / "flower").is_dir() and any(folder.iterdir()):
        print(
            f"simulation: {folder} is not the folder of an earlier simulation; name another one.",
            file=sys.stderr,
        )
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "flower").mkdir(parents=True)
    build_base(CACHE, _show_base)
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C
    try:
        with _superlink(folder) as process:
            memory = _Memory(process.pid)
            status = _flwr_run(options, folder)
            peak_mb = memory.stop()
    except KeyboardInterrupt:
        print("Stopped.")
        return 130
    except (OSError, TimeoutError) as error:
        print(f"simulation: {error}", file=sys.stderr)
        return 1
    report = folder / "report.json"
    if status != 0 or not report.is_file():
        print(
            f"simulation: it did not end as it should; see {folder}/flower/run.log", file=sys.stderr
        )
        return 1
    figures = {"wall_s": round(time.monotonic() - begun, 1), "peak_memory_mb": peak_mb}
    report.write_text(json.dumps({**json.loads(report.read_text()), **figures}, indent=1))
    print(
        f"{figures['wall_s']:.0f} s with Flower's start and stop, "
        f"{peak_mb} MB at most over all processes"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.simulation.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--nodes", type=int, default=50, help="virtual nodes (50)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=REPOSITORY / "simulation-run",
        help="results (simulation-run)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a key of [tool.flwr.app.config] in simulation/pyproject.toml; may be repeated",
    )  # fmt: skip
    return parser


@contextmanager
def _superlink(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperLink in simulation mode, in a session of its own, ready when this yields.

    It is stopped with all that it started.
    """
    port = free_port()
    (folder / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "simulation"\n\n'
        f'[superlink.simulation]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = [
        _program("flower-superlink"), "--insecure", "--simulation", "--control-api-address",
        f"127.0.0.1:{port}",
        "--serverappio-api-address", "127.0.0.1:0",
    ]  # fmt: skip
    with (folder / "flower" / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_ready(process, port, folder)
        yield process
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    until = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            if process.poll() is not None:
                raise OSError(
                    f"flower-superlink ended with {process.returncode}; "
                    f"see {folder}/flower/superlink.log."
                )
            try:
                grpc.channel_ready_future(channel).result(timeout=0.5)
                return
            except grpc.FutureTimeoutError:
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"flower-superlink is not ready after {START_TIMEOUT_S} s."
                    ) from None
    finally:
        channel.close()


def _flwr_run(options: argparse.Namespace, folder: Path) -> int:
    config = " ".join([f"folder='{folder}'", *map(_as_toml, options.set)])
    federation = (
        f"num-supernodes={options.nodes} client-resources-num-cpus=1 "
        f"init-args-num-cpus={os.cpu_count() or 1}"
    )
    command = [
        _program("flwr"), "run", str(APP), "--stream", "--run-config", config,
        "--federation-config", federation
    ]  # fmt: skip
    with (
        (folder / "flower" / "run.log").open("w") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith("lorikeet: "):
                    print(line.removeprefix("lorikeet: "), end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()  # it would follow the run for as long as the SuperLink is there
            raise
    return process.returncode


def _as_toml(text: str) -> str:
    """KEY=VALUE with a value that TOML reads as a string unless it is a number."""
    key, _, value = text.partition("=")
    try:
        float(value)
    except ValueError:
        return f"{key}='{value}'"
    return f"{key}={value}"


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Flower finds its own programs by name.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(folder / "flower"),
        "PYTHONPATH": path,
        "PATH": programs,
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the SuperLink, then SIGKILL to whatever is left of its processes."""
    with _gone_is_fine():
        left = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
        for child in psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)[1]:
            with _gone_is_fine():
                child.kill()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
        return


class _Memory:
    """Samples what all processes below `pid` hold, shared pages counted once (PSS)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Peak in MB."""
        self._done.set()
        self._thread.join()
        return self._peak >> 20

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            with _gone_is_fine():
                held = 0
                for process in psutil.Process(self._pid).children(recursive=True):
                    with _gone_is_fine():
                        held += process.memory_full_info().pss
                self._peak = max(self._peak, held)


def _show_base(step: int, steps: int) -> None:
    if step % 50 == 0 or step == steps:
        print(f"base model: {step} of {steps} steps", flush=True)


if __name__ == "__main__":
    sys.exit(main())
