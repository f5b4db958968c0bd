"""`make demo`: one central and four edge nodes learn together, shown live, measured, and judged.

In: seed and size. Out: demo-report.json, demo-plot.png, and exit code 0 only when every bar of a full run holds.
Everything runs in demo-run/ (logs in demo-run/logs); an earlier run's directory is removed. Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from examples.quickstart import live
from examples.quickstart.plot import write_plot
from examples.quickstart.processes import ChildFailed, child_environment, stop_recorded
from examples.quickstart.report import Report, build_report, check_bars, last_snapshot_line, print_summary, write_report
from examples.quickstart.scale import SIZES, Size
from examples.quickstart.story import Story
from examples.quickstart.system import REPOSITORY, System

RUN = REPOSITORY / "demo-run"
CACHE = REPOSITORY / ".cache" / "quickstart"
REPORT = REPOSITORY / "demo-report.json"
PLOT = REPOSITORY / "demo-plot.png"


def main() -> int:
    options = _parser().parse_args()
    console = Console(soft_wrap=True)
    started = time.monotonic()
    try:
        with only_demo():
            for name in stop_recorded(RUN / "processes.json"):
                console.print(f"stopped {name}")
            if options.stop:
                return 0
            base, base_seconds = build_base_model(console)
            return asyncio.run(_run(options, console, started, base, base_seconds))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("Stopped.")
        return 130
    except ExceptionGroup as group:
        failures = _leaves(group)
        for error in failures:
            console.print(f"demo: {error}", style="red", markup=False)
        if all(isinstance(error, ChildFailed) for error in failures):
            return 1
        raise
    except ChildFailed as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 1


@contextmanager
def only_demo() -> Iterator[None]:
    """Two demos at once would share demo-run and the cores; raises ChildFailed when one runs already."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChildFailed(
                "Another demo runs in this directory. Stop it with Ctrl-C, or wait for its end."
            ) from None
        yield


def build_base_model(console: Console) -> tuple[Path, float]:
    """The cached base model, trained first when it is not there; and the seconds that took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "examples.quickstart.model", "--cache", str(CACHE)]
    # The only process that runs now, so it may use every core.
    environment = child_environment({}, REPOSITORY)
    del environment["OMP_NUM_THREADS"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ChildFailed(f"The base model could not be built (exit code {done.returncode}); its message is above.")
    base = Path(done.stdout.strip().splitlines()[-1])
    console.print(f"base model: {base.relative_to(REPOSITORY)}")
    return base, time.monotonic() - began


async def _run(options: argparse.Namespace, console: Console, started: float, base: Path, base_seconds: float) -> int:
    task = asyncio.current_task()
    assert task is not None
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    size = SIZES[options.size]
    shutil.rmtree(RUN, ignore_errors=True)
    system = System(RUN, base, size, options.seed)
    story = Story(
        system, started, lambda line: console.print(f"[dim]{story.now_s():5.0f} s[/]  {line}", highlight=False)
    )
    keep = False
    try:
        async with live.show(story, console):
            await system.start()
            await story.run()
        report = await _report(story, base_seconds, options.install_seconds)
        write_report(report, REPORT)
        await asyncio.to_thread(write_plot, report, PLOT)
        code = _judge(report, size, console)
        keep = options.keep
        return code
    finally:
        if keep:
            await system.release()
            console.print(system.how_to_use(), markup=False, highlight=False)
        else:
            console.print(last_snapshot_line(story.snapshot), highlight=False)
            console.print("stopping the nodes and central ...")
            await asyncio.shield(system.stop())


async def _report(story: Story, base_seconds: float, install_seconds: float) -> Report:
    """Counts of sent updates come from the nodes' own outboxes, everything else from the endpoints and central."""
    sent = 0
    for plan in story.system.plans:
        entries = await story.system.node_cli(plan.key, "outbox", "list", "--json")
        sent += sum(entry["state"] in ("waiting", "admitted", "refused") for entry in entries)
    all_ready = max(record.ready_at_s or 0.0 for record in story.records.values())
    settled = story.settled_s or story.now_s()
    seconds = {
        "install": install_seconds,
        "base_model": base_seconds,
        "startup": all_ready - base_seconds,
        "learning": settled - all_ready,
        "total": install_seconds + story.now_s(),
    }
    restarts = {child.name: child.restarts for child in story.system.children}
    return build_report(story, seconds, sent, restarts)


def _judge(report: Report, size: Size, console: Console) -> int:
    bars = check_bars(report) if size.stop_at is not None else []
    print_summary(report, bars, console)
    console.print(f"Report: {REPORT.name}   Plot: {PLOT.name}   Logs: {RUN.name}/logs")
    return 0 if all(bar.holds for bar in bars) else 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed is another world: code books, tasks, sampling"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="small: two nodes, two rounds, no bars")
    parser.add_argument("--keep", action="store_true", help="leave the system running and say how to use it")
    parser.add_argument("--stop", action="store_true", help="only stop what an earlier --keep left running")
    parser.add_argument("--install-seconds", type=float, default=0.0, help="what the installation took, for the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
