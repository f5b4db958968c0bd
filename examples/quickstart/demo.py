"""`make demo`: one central and four edge nodes learn together, shown live, measured, and judged.

In: model, seed and size. Out: demo-report.json, demo-plot.png, and exit code 0 only when every bar
of a full run holds. Everything runs in demo-run/ (logs in demo-run/logs); an earlier run's
directory is removed. Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from examples.quickstart import live
from examples.quickstart.plot import write_plot
from examples.quickstart.processes import ChildFailed, child_environment, stop_recorded
from examples.quickstart.report import (
    build_report,
    check_bars,
    last_snapshot_line,
    print_summary,
    write_report,
)
from examples.quickstart.story import Story
from examples.quickstart.system import REPOSITORY, System
from examples.quickstart.tiny import QUICKSTART
from examples.quickstart.world import Report, World
from examples.smollm2.world import SMOLLM2
from lorikeet.locks import locked

RUN = REPOSITORY / "demo-run"
CACHE = REPOSITORY / ".cache"
WORLDS = {world.name: world for world in (QUICKSTART, SMOLLM2)}
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
            world = WORLDS[options.model]
            base, beside, base_seconds = build_base_model(world, console)
            shutil.rmtree(RUN, ignore_errors=True)
            system = System(world, RUN, base, world.sizes[options.size], options.seed, beside)
            return asyncio.run(_run(options, console, started, system, base_seconds))
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
    """Raises ChildFailed when a demo runs already: two would share demo-run and the cores."""
    folder = CACHE / QUICKSTART.name
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / "demo.lock"))
        except BlockingIOError:
            raise ChildFailed(
                "Another demo runs in this directory. Stop it with Ctrl-C, or wait for its end."
            ) from None
        yield


def build_base_model(world: World, console: Console) -> tuple[Path, dict[str, str], float]:
    """The cached base model and the settings of what stands beside it; and the seconds that took.

    Both are made first when they are not there.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", world.model, "--cache", str(CACHE / world.name)]
    # The only process that runs now, so it may use every core.
    environment = child_environment({}, REPOSITORY)
    del environment["OMP_NUM_THREADS"]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise ChildFailed(
            f"The base model could not be built (exit code {done.returncode}); see above."
        )
    base = Path(done.stdout.strip().splitlines()[-1])
    console.print(f"base model: {base.relative_to(REPOSITORY)}")
    return base, dict(world.beside_base(base)), time.monotonic() - began


async def _run(
    options: argparse.Namespace,
    console: Console,
    started: float,
    system: System,
    base_seconds: float,
) -> int:
    task = asyncio.current_task()
    assert task is not None
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    story = Story(
        system,
        started,
        lambda line: console.print(f"[dim]{story.now_s():5.0f} s[/]  {line}", highlight=False),
    )
    keep = False
    try:
        async with live.show(story, console):
            await system.start()
            await story.run()
        report = await _report(story, base_seconds, options.install_seconds)
        write_report(report, REPORT)
        await asyncio.to_thread(write_plot, report, PLOT)
        code = _judge(report, system, console)
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
    """Counts of sent updates come from the nodes' own outboxes.

    Everything else comes from the endpoints and central.
    """
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


def _judge(report: Report, system: System, console: Console) -> int:
    bars = check_bars(report, system.world) if system.size.stop_at is not None else []
    print_summary(report, bars, console)
    console.print(f"Report: {REPORT.name}   Plot: {PLOT.name}   Logs: {RUN.name}/logs")
    return 0 if all(bar.holds for bar in bars) else 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.demo", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--model",
        choices=sorted(WORLDS),
        default=QUICKSTART.name,
        help="smollm2: a real instruct model of 135 M parameters, and work in plain English",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed is another world: code books, tasks, sampling",
    )
    parser.add_argument(
        "--size",
        choices=sorted(QUICKSTART.sizes),
        default="full",
        help="small: two nodes, two rounds, no bars",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the system running and say how to use it"
    )
    parser.add_argument(
        "--stop", action="store_true", help="only stop what an earlier --keep left running"
    )
    parser.add_argument(
        "--install-seconds",
        type=float,
        default=0.0,
        help="what the installation took, for the report",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
