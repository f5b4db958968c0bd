"""The picture of a run: success over time, with every release marked.

In: the report of report.py. Out: a PNG. matplotlib without a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"A": "#0072b2", "B": "#009e73", "C": "#d55e00", "D": "#8b5fbf"}
"""Distinguishable with every common kind of colour blindness (Okabe and Ito, and a violet)."""
MARKERS = {"A": "o", "B": "s", "C": "^", "D": "D"}
INK = "#30343b"
GRID = "#e3e6ea"


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Panels over one time axis: the nodes' own work, what the base could do, any English."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nodes = report["detail"]["nodes"]
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": "#9aa0a8",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with pyplot.rc_context(style):
        texts = report["detail"]["text_logprob"]
        ratios, height = ((2.4, 1, 0.7), 8.0) if texts else ((2.4, 1), 6.6)
        figure, (work, skill, *english) = pyplot.subplots(
            len(ratios),
            1,
            figsize=(10, height),
            sharex=True,
            height_ratios=ratios,
            layout="constrained",
        )
        for axes in (work, skill):
            axes.set_ylim(-3, 104)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylabel("verified success, %")
        _release_marks(work, skill, nodes)
        for key, node in nodes.items():
            _own_work(work, key, node)
            _base_skill(skill, key, node)
        work.set_title("Own work of each node", loc="left", fontweight="bold", fontsize=11, pad=26)
        work.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        skill.set_title(
            "What the base could do before (anchor), by release",
            loc="left",
            fontweight="bold",
            fontsize=11,
        )
        lowest = report["detail"]["lowest_anchor"]
        skill.axhline(lowest, color="#b0b5bd", linewidth=1, linestyle=(0, (4, 3)))
        skill.text(
            1.01,
            lowest,
            f"bar: {lowest:.0f}",
            transform=skill.get_yaxis_transform(),
            va="center",
            fontsize=9,
        )
        for axes in english:
            _english(axes, texts, nodes)
        figure.axes[-1].set_xlabel("seconds since the start of the demo")
        figure.suptitle(_headline(report), x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _own_work(axes: Any, key: str, node: dict[str, Any]) -> None:
    points = [point for point in node["points"] if point["kind"] in ("before", "wave", "after")]
    if not points:
        return
    name = f"{key}  {node['environment']}" + ("" if node["learns"] else "\n    (never trains)")
    style = {"color": COLOURS[key], "marker": MARKERS[key]}
    at = [point["at_s"] for point in points]
    rate = [100 * point["passed"] / point["total"] for point in points]
    axes.plot(at, rate, linewidth=1.8, markersize=4.5, label=name, **style)
    last = points[-1]
    if last["kind"] == "after":
        axes.plot(
            at[-1:], rate[-1:], markersize=9, markeredgecolor="white", markeredgewidth=1.2, **style
        )


def _base_skill(axes: Any, key: str, node: dict[str, Any]) -> None:
    """One step for each release, from when the node served it."""
    rates = [
        100 * point["passed"] / point["total"]
        for point in node["points"]
        if point["kind"] == "anchor"
    ]
    served = [entry["at_s"] for entry in node["served"]][: len(rates)]
    if not served:
        return
    end = node["points"][-1]["at_s"]
    rates = rates[: len(served)]
    axes.step([*served, end], [*rates, rates[-1]], where="post", linewidth=1.4, color=COLOURS[key])
    axes.plot(
        served, rates, linestyle="none", marker=MARKERS[key], markersize=4, color=COLOURS[key]
    )


def _english(axes: Any, texts: dict[str, float], nodes: dict[str, Any]) -> None:
    """Log-probability of English, one step for each release from when the first node served it."""
    first: dict[str, float] = {}
    for node in nodes.values():
        for entry in node["served"]:
            at_s = entry["at_s"]
            first[entry["release"]] = min(first.get(entry["release"], at_s), at_s)
    end = max(node["points"][-1]["at_s"] for node in nodes.values())
    at, means = [first[label] for label in texts], list(texts.values())
    axes.step([*at, end], [*means, means[-1]], where="post", linewidth=1.4, color=INK)
    axes.plot(at, means, linestyle="none", marker="o", markersize=4, color=INK)
    axes.axhline(means[0] - 0.1, color="#b0b5bd", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(means[0] - 0.2, means[0] + 0.2)
    axes.set_ylabel("nats a token")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        "Mean log-probability of English text", loc="left", fontweight="bold", fontsize=11
    )


def _release_marks(work: Any, skill: Any, nodes: dict[str, Any]) -> None:
    """A vertical line where the first node of a cohort served each release."""
    first: dict[tuple[str, str], float] = {}
    for node in nodes.values():
        for entry in node["served"]:
            mark = (node["cohort"], entry["release"])
            first[mark] = min(first.get(mark, entry["at_s"]), entry["at_s"])
    for (cohort, label), at_s in first.items():
        colour = COLOURS["D"] if cohort == "zeta" else "#8a9099"
        for axes in (work, skill):
            axes.axvline(at_s, color=colour, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
        version = label.partition("-")[0]
        if version == "v0":
            continue
        height, text = (1.035, f"zeta {version}") if cohort == "zeta" else (1.0, version)
        work.text(
            at_s,
            height,
            text,
            transform=work.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=colour,
        )


def _headline(report: dict[str, Any]) -> str:
    after = report["success"]["after"]
    rates = ", ".join(f"{key} {value:.0f} %" for key, value in after.items())
    title = report["detail"]["title"]
    return f"{title}, seed {report['seed']}: {report['releases']} releases, then {rates}"
