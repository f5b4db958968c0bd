"""The live picture of a run.

In: a Story. Out: on a terminal, a table that is drawn again twice a second; elsewhere, one plain
line for each event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.quickstart.story import NodeRecord, Story

REFRESH_S = 0.5


@asynccontextmanager
async def show(story: Story, console: Console) -> AsyncIterator[None]:
    """Keep the picture while the body runs; nothing is drawn when the console is no terminal."""
    if not console.is_terminal:
        yield
        return
    with Live(picture(story), console=console, auto_refresh=False) as live:

        async def refresh() -> None:
            while True:
                live.update(picture(story), refresh=True)
                await asyncio.sleep(REFRESH_S)

        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            live.update(picture(story), refresh=True)


def picture(story: Story) -> Group:
    """The whole picture at this moment."""
    title = Text(
        f"{story.world.title}, {story.phase}, {story.now_s():.0f} s, seed {story.seed}",
        style="bold",
    )
    return Group(title, _nodes(story), _cohorts(story))


def _nodes(story: Story) -> Table:
    columns = (
        "node",
        "cohort",
        "serves",
        "requests",
        "before",
        "last wave",
        "base",
        "driver",
        "learner",
        "outbox",
    )
    table = _table(columns, right=("requests", "before", "base", "outbox"))
    for key, record in story.records.items():
        before, wave, anchor = record.last("before"), record.last("wave"), record.last("anchor")
        table.add_row(
            key,
            record.plan.cohort,
            record.serving or "-",
            f"{record.requests}" + (f" [red]({record.failed} failed)[/]" if record.failed else ""),
            f"{before.percent:.0f} %" if before else "-",
            f"{wave.percent:.0f} % on {wave.release.partition('-')[0]}" if wave else "-",
            f"{anchor.percent:.0f} %" if anchor else "-",
            record.state,
            _learner(story, record),
            _outbox(story, record),
        )
    return table


def _learner(story: Story, record: NodeRecord) -> str:
    if not record.plan.learns:
        return "off"
    return "training" if story.expects_update(record) else "idle"


def _outbox(story: Story, record: NodeRecord) -> str:
    node = story.snapshot.nodes.get(record.plan.name) if story.snapshot else None
    return str(node.status.outbox_waiting) if node else "-"


def _cohorts(story: Story) -> Table:
    counted = ("waiting", "planned", "merged", "superseded", "set aside")
    table = _table(("cohort", "stable", *counted, "last verdict"), right=counted)
    snapshot = story.snapshot
    if snapshot is None:
        return table
    for cohort in sorted({release.cohort for release in snapshot.releases}):
        counts = snapshot.update_counts(cohort)
        head = snapshot.head(cohort)
        decided = [r for r in snapshot.releases if r.cohort == cohort and r.verdict]
        last = max(decided, key=lambda r: r.created_at, default=None)
        numbers = (str(counts[state.replace(" ", "_")]) for state in counted)
        verdict = (
            f"{last.label.partition('-')[0]} {last.verdict.partition('. ')[0]}" if last else "-"
        )
        table.add_row(cohort, head.label if head else "-", *numbers, verdict)
    return table


def _table(columns: Sequence[str], right: Sequence[str]) -> Table:
    """Numbers to the right; a row is always one line."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return table
