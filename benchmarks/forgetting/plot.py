"""The picture of `benchmarks.forgetting`: success in what was learnt, step by step.

In: its report. Out: a PNG. matplotlib without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.forgetting.federation import ANCHOR

COLOURS = ("#0072b2", "#009e73", "#d55e00", "#8b5fbf")
"""Of the rules, in their order (Okabe and Ito, and a violet)."""


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Two panels over steps: mean success in the desks learnt so far, and in the anchors.

    A line is the mean over seeds, its band the lowest and highest seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    titles = ("Desks learnt so far", "What the base could do (anchors)")
    for axes, title, of in zip(panels, titles, (_learnt, _anchor), strict=True):
        for colour, (rule, seeds) in zip(COLOURS, report["success"].items(), strict=False):
            lines = [of(rows) for rows in seeds.values()]
            steps = range(1, len(lines[0]) + 1)
            across = list(zip(*lines, strict=True))
            axes.plot(steps, [mean(values) for values in across], color=colour, label=rule)
            low, high = ([pick(values) for values in across] for pick in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="environments learnt", ylim=(-3, 104))
        axes.grid(axis="y", color="#e3e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out tasks solved, %")
    panels[1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _learnt(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """After each step, the mean of the desks up to it."""
    return [
        mean(row[f"desk-{number}"] for number in range(1, step + 1))
        for step, row in enumerate(rows)
        if step
    ]


def _anchor(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return [row[ANCHOR] for row in rows[1:]]
