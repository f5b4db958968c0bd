"""kill -9 of every kind of process in the middle of a small run, and what became of the work.

In: nothing. Out: a table of what was killed, when, and how long recovery took; a table of promises;
exit code 0 only when every process was killed at the intended moment, the system reached a further
release by itself after each, and nothing was lost or doubled. Only our own children are ever
signalled, by pid.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import grpc
import httpx
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from examples.quickstart.demo import RUN, build_base_model, only_demo
from examples.quickstart.durability import Finding, check_run
from examples.quickstart.environments import CompanyApi, Node
from examples.quickstart.operator_view import OperatorView, Snapshot
from examples.quickstart.processes import ChildFailed, stop_recorded
from examples.quickstart.steady_client import SteadyClient
from examples.quickstart.system import System
from examples.quickstart.tiny import QUICKSTART, SIZES

SIZE = replace(SIZES["small"], name="kill", first_wave=60)
# Short rounds learn slowly, so that there are failures to learn from until the end.
OVERRIDES = {"EDGE_LEARNING__STEPS": "20", "EDGE_LEARNING__CHECKPOINT_STEPS": "5"}
MOMENT_TIMEOUT_S = 240.0
RECOVERY_TIMEOUT_S = 300.0
REST_TIMEOUT_S = 120.0
POLL_S = 0.1

T = TypeVar("T")
Probe = Callable[[], Awaitable[int | None]]
"""The pid of the victim at the intended moment, or of its successor once that works.

None until then.
"""


@dataclass
class Kill:
    """One kill -9 and what followed."""

    victim: str
    moment: str
    pid: int
    at_s: float
    alive_again_s: float | None = None
    next_release_s: float | None = None
    release: str = ""

    @property
    def recovered(self) -> bool:
        return self.alive_again_s is not None and self.next_release_s is not None


class KillTest:
    """The run; `kills` fills while it goes on."""

    def __init__(self, system: System, operator: OperatorView, console: Console) -> None:
        self._system = system
        self._operator = operator
        self._console = console
        self._started = time.monotonic()
        self.kills: list[Kill] = []

    async def run(self) -> None:
        """All kills, one at a time.

        Raises TimeoutError when a moment never comes or a recovery never ends.
        """
        learner, vllm = "edge_node.learning.worker", "serving.vllm_entry"

        async def learner_in_round() -> int | None:
            return self._child_of("A", learner) if self._in_round("A") else None

        async def learner_again() -> int | None:
            return self._child_of("A", learner)

        async def vllm_of_a() -> int | None:
            return self._child_of("A", vllm) if await self._ready("A") else None

        async def supervisor_in_round() -> int | None:
            return self._system.nodes["B"].pid if self._in_round("B") else None

        async def supervisor_again() -> int | None:
            return self._system.nodes["B"].pid if await self._ready("B") else None

        async def central_in_merge() -> int | None:
            snapshot = await self._snapshot()
            return (
                self._system.central.pid
                if snapshot and snapshot.update_counts()["planned"]
                else None
            )

        async def central_again() -> int | None:
            return self._system.central.pid if await self._snapshot() else None

        await self._kill("learner of node A", "while it trains", learner_in_round, learner_again)
        await self._kill("vLLM of node A", "while it answers", vllm_of_a, vllm_of_a)
        await self._kill(
            "supervisor of node B",
            "while its learner trains",
            supervisor_in_round,
            supervisor_again,
        )
        await self._kill("central", "while it merges and gates", central_in_merge, central_again)

    async def rest(self) -> None:
        """Until central has nothing planned and no node waits to send."""

        async def at_rest() -> bool | None:
            snapshot = await self._snapshot()
            if snapshot is None or snapshot.update_counts()["planned"]:
                return None
            waiting = [node.status.outbox_waiting for node in snapshot.nodes.values()]
            in_round = any(self._in_round(plan.key) for plan in self._system.plans)
            return (not any(waiting) and not in_round) or None

        await self._until(at_rest, REST_TIMEOUT_S, "the system to come to rest")

    async def _kill(self, victim: str, moment: str, at: Probe, again: Probe) -> None:
        pid = await self._until(at, MOMENT_TIMEOUT_S, f"the moment to kill {victim} ({moment})")
        version = await self._version()
        psutil.Process(pid).kill()
        kill = Kill(victim, moment, pid, self._now_s())
        self.kills.append(kill)
        self._console.print(
            f"{kill.at_s:5.0f} s  kill -9 of {victim} (pid {pid}) {moment}", highlight=False
        )

        async def successor() -> int | None:
            found = await again()
            return found if found != pid else None

        async def next_release() -> str | None:
            snapshot = await self._snapshot()
            head = snapshot.head("shared") if snapshot else None
            return head.label if head and head.version > version else None

        new_pid = await self._until(successor, RECOVERY_TIMEOUT_S, f"{victim} to work again")
        kill.alive_again_s = self._now_s() - kill.at_s
        self._console.print(
            f"{self._now_s():5.0f} s  {victim} works again (pid {new_pid})", highlight=False
        )
        kill.release = await self._until(
            next_release, RECOVERY_TIMEOUT_S, f"a release after v{version}"
        )
        kill.next_release_s = self._now_s() - kill.at_s
        self._console.print(f"{self._now_s():5.0f} s  release {kill.release}", highlight=False)

    async def _version(self) -> int:
        async def head() -> int | None:
            snapshot = await self._snapshot()
            release = snapshot.head("shared") if snapshot else None
            return release.version + 1 if release else None  # + 1: zero would read as "not yet"

        return await self._until(head, RECOVERY_TIMEOUT_S, "central") - 1

    async def _until(
        self, probe: Callable[[], Awaitable[T | None]], timeout_s: float, what: str
    ) -> T:
        limit = time.monotonic() + timeout_s
        while not (value := await probe()):
            self._system.check()
            if time.monotonic() > limit:
                raise TimeoutError(
                    f"Waited {timeout_s:.0f} s for {what}. Logs are in {RUN.name}/logs."
                )
            await asyncio.sleep(POLL_S)
        return value

    async def _snapshot(self) -> Snapshot | None:
        try:
            return await self._operator.snapshot()
        except grpc.aio.AioRpcError:
            return None

    async def _ready(self, key: Node) -> bool:
        async with httpx.AsyncClient(timeout=5) as client:
            try:
                return (
                    await client.get(f"{self._system.url(key)}/ready")
                ).status_code == httpx.codes.OK
            except httpx.HTTPError:
                return False

    def _in_round(self, key: Node) -> bool:
        """From the node's log, which we capture as any process manager does."""
        log = self._system.nodes[key].log.read_text(errors="replace")
        return log.rfind(" round starts") > max(
            log.rfind(" round finished"), log.rfind(" round abandoned")
        )

    def _child_of(self, key: Node, part_of_command: str) -> int | None:
        supervisor = self._system.nodes[key].pid
        if supervisor is None:
            return None
        try:
            for child in psutil.Process(supervisor).children():
                if any(part_of_command in argument for argument in child.cmdline()):
                    return int(child.pid)
        except psutil.NoSuchProcess:
            pass
        return None

    def _now_s(self) -> float:
        return time.monotonic() - self._started


async def _run(console: Console) -> int:
    base, _, _ = await asyncio.to_thread(build_base_model, QUICKSTART, console)
    shutil.rmtree(RUN, ignore_errors=True)
    system = System(QUICKSTART, RUN, base, SIZE, seed=0, overrides=OVERRIDES)
    clients = {
        plan.name: SteadyClient(system.url(plan.key), CompanyApi(plan.key), seed=1)
        for plan in system.plans
    }
    problem = ""
    kills: Sequence[Kill] = ()
    try:
        await system.start()
        await asyncio.gather(*(system.wait_ready(plan.key) for plan in system.plans))
        console.print(
            "two nodes are ready; traffic starts and does not stop for anything that follows"
        )
        traffic = [asyncio.create_task(client.run()) for client in clients.values()]
        async with system.operator() as operator:
            test = KillTest(system, operator, console)
            try:
                await test.run()
            except (TimeoutError, ChildFailed) as error:
                problem = str(error)
            kills = test.kills
            for task in traffic:
                task.cancel()
            await asyncio.gather(*traffic, return_exceptions=True)
            if not problem:
                await test.rest()
    finally:
        await asyncio.shield(system.stop())
    findings = check_run(RUN, {name: client.acknowledged for name, client in clients.items()})
    _print(console, kills, findings, {child.name: child.restarts for child in system.children})
    if problem:
        console.print(f"kill_test: {problem}", style="red", markup=False)
    whole = (
        len(kills) == 4
        and all(kill.recovered for kill in kills)
        and all(finding.holds for finding in findings)
    )
    console.print("[green]PASS[/]" if whole and not problem else "[red]FAIL[/]")
    return 0 if whole and not problem else 1


def _print(
    console: Console, kills: Sequence[Kill], findings: Sequence[Finding], restarts: dict[str, int]
) -> None:
    table = Table(title="kill -9", title_justify="left")
    for column in ("victim", "moment", "at", "works again after", "next release after", "release"):
        table.add_column(column, justify="right" if column.endswith(("at", "after")) else "left")
    for kill in kills:
        after = (
            "-" if value is None else f"{value:.1f} s"
            for value in (kill.alive_again_s, kill.next_release_s)
        )
        table.add_row(kill.victim, kill.moment, f"{kill.at_s:.0f} s", *after, kill.release)
    console.print(table)
    promises = Table(title="What was promised", title_justify="left")
    for column in ("", "promise", "seen"):
        promises.add_column(column)
    for finding in findings:
        promises.add_row(
            "[green]PASS[/]" if finding.holds else "[red]FAIL[/]", finding.promise, finding.seen
        )
    console.print(promises)
    console.print(
        "Started again by the process manager: "
        + ", ".join(f"{n} {name}" for name, n in restarts.items())
    )


def main() -> int:
    console = Console(soft_wrap=True)
    with only_demo():
        stop_recorded(RUN / "processes.json")
        return asyncio.run(_run(console))


if __name__ == "__main__":
    sys.exit(main())
