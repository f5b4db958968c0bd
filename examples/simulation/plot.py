"""The picture of a simulation: success of the virtual nodes over rounds.

In: the report. Out: a PNG. matplotlib without a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.quickstart.plot import GRID, INK

COLOURS = {"acme-a": "#0072b2", "acme-b": "#009e73", "acme-c": "#d55e00", "public": "#7a7f87"}


def write_plot(report: dict[str, Any], path: Path) -> None:
    """One line per environment, over the nodes that have it; a rejected round is a hollow mark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rounds = report["rounds"]
    with pyplot.rc_context(
        {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    ):
        figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
        for name in sorted({name for one in rounds for name in one["after"]}):
            judged = [one for one in rounds if name in one["after"]]
            points = [
                (judged[0]["number"] - 1, judged[0]["before"][name], True),
                *((one["number"], one["after"][name], one["accepted"]) for one in judged),
            ]
            colour = COLOURS.get(name)
            label = f"{name} (anchor)" if name == "public" else name
            axes.plot(
                [number for number, _, _ in points],
                [100 * rate for _, rate, _ in points],
                color=colour,
                label=label,
                linewidth=2,
            )
            for number, rate, accepted in points:
                axes.plot(
                    number,
                    100 * rate,
                    "o",
                    color=colour,
                    markerfacecolor=colour if accepted else "white",
                )
        axes.set_xticks(range(len(rounds) + 1))
        axes.set_xlabel("round")
        axes.set_ylabel("verified success on held-out tasks, %")
        axes.set_ylim(-3, 104)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        nodes, strategy = report["nodes"], report["config"]["strategy"]
        what = f"{nodes} virtual nodes, {strategy}, {report['seconds']:.0f} s"
        axes.set_title(what, loc="left", fontsize=11)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
