"""`edge-node anchors make`, of which `cli.py` is the program.

In: arguments and EDGE_BASE__PATH. Out: a directory of anchors, one line about it, and a progress
bar on stderr where that is a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from edge_node.learning.anchors import SETTING, summary
from edge_node.learning.questions import OPEN_FILE, QA_FILE
from edge_node.settings import load_settings

anchors = typer.Typer()


@anchors.callback()
def about() -> None:
    """Make what keeps the base's skills while the node learns."""


@anchors.command("make")
def make(
    out: Annotated[Path, typer.Option(help="New directory for the anchors.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    plain: Annotated[
        int, typer.Option(min=0, help="Samples of text that the base writes without a prompt.")
    ] = 64,
    open_file: Annotated[
        Path | None,
        typer.Option(
            "--open", help='Open questions, {"question": ...} a line. Unset: 32 of our own.'
        ),
    ] = None,
    qa_file: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            help='Questions with known answers, {"question": ..., "answers": [...]} a line. Kept '
            "are those that the base answers right. Unset: 62 of our own.",
        ),
    ] = None,
) -> None:
    """Let the base write samples of its own, which rounds then keep it near to.

    It needs the base model alone and no data set. A base of 135 million parameters takes two
    minutes of one core.
    """
    from edge_node.learning.make_anchors import make_anchors

    made = make_anchors(
        load_settings(),
        out,
        seed=seed,
        plain=plain,
        open_file=open_file or OPEN_FILE,
        qa_file=qa_file or QA_FILE,
        bar=_bar,
    )
    print(
        f"Anchors in {out}: {summary(made.index.samples)}, {made.size_bytes / 1e6:.1f} MB, by base "
        f"{made.index.base[:12]}. {made.right} of {made.asked} questions were answered right. "
        f"Next: set {SETTING} to this directory."
    )


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int], None]]:
    with typer.progressbar(
        length=steps, label="Anchors", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as shown:
        yield shown.update
