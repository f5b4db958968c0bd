"""The picture of benchmarks.federation: success by round, the mean of the seeds.

In: its report. Out: a PNG. matplotlib without a display.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

LINES = {
    "centralised": ("one learner with all data", "#000000", "--"),
    "default": ("default: exact product mean, bf16", "#0072b2", "-"),
    "product-mean": ("exact product mean, float32", "#56b4e9", "-"),
    "int8-both": ("the same, int8 both ways", "#009e73", "-"),
    "step-2": ("default with server step 2", "#cc79a7", "-"),
    "factor-mean": ("mean of factors", "#d55e00", "-"),
    "local-A": ("A alone", "#999999", ":"),
    "local-B": ("B alone", "#666666", ":"),
}
"""Words, colour (Okabe and Ito) and dash of each rule."""
PANELS = {
    "A and B, who learn": "AB",
    "C, who never learns": "C",
    "what the base could do": ["base"],
}


def write_plot(report: dict[str, Any], path: Path) -> None:
    """One panel for A and B, for C, and for what the base could do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(PANELS), figsize=(12, 4.2), sharey=True, layout="constrained"
    )
    for axes, (title, names) in zip(panels, PANELS.items(), strict=True):
        for rule, (words, colour, dash) in LINES.items():
            seeds = report["success"].get(rule)
            if not seeds:
                continue
            rounds = sorted(map(int, next(iter(seeds.values()))))
            start = mean(figures[name] for figures in report["before"].values() for name in names)
            means = [
                mean(figures[str(at)][name] for figures in seeds.values() for name in names)
                for at in rounds
            ]
            axes.plot([0, *rounds], [start, *means], dash, color=colour, label=words, marker=".")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("round")
        axes.grid(axis="y", color="#e3e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("verified success on held-out tasks, %")
    panels[0].set_ylim(-3, 103)
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
