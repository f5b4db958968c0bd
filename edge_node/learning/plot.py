"""A picture of one round: what it logged, over its steps.

In: the round's progress file. Out: a PNG. matplotlib without a display, imported when it draws: a
node needs it for nothing else.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edge_node.errors import SettingsError, StorageError
from edge_node.learning.reports import read_progress, report_folder
from edge_node.settings import EdgeSettings

DRAWN = {
    "loss": "loss",
    "reward": "mean reward",
    "kl_base": "KL from the base, nats a token",
    "kl_release": "KL from the release, nats a token",
}
"""What is drawn, one below the other, and the name of its axis."""


def draw(settings: EdgeSettings, round_id: str, file: Path) -> None:
    """Draw the round into `file`.

    Raises:
        SettingsError: matplotlib is not installed.
        StorageError: the round has no report (any more), or the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError(
            "The package matplotlib is not installed, and a plot needs it. Run `pip install "
            "matplotlib`, or take the numbers of `edge-node rounds show --json`."
        )
    progress = read_progress(settings.data_dir, round_id)
    if progress is None or not progress.entries:
        raise StorageError(
            f"There is no report of round {round_id} in "
            f"{report_folder(settings.data_dir, round_id)}: it has made no step yet, or it is too "
            "old. Choose a newer one from `edge-node rounds list`."
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seen = [name for name in DRAWN if any(name in entry for entry in progress.entries)]
    figure, axes = pyplot.subplots(
        len(seen), 1, figsize=(7, 2.4 * len(seen)), sharex=True, squeeze=False
    )
    for axis, name in zip(axes[:, 0], seen, strict=True):
        points = [(entry["step"], entry[name]) for entry in progress.entries if name in entry]
        axis.plot(*zip(*points, strict=True), linewidth=1.5)
        axis.set_ylabel(DRAWN[name])
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    axes[0, 0].set_title(round_id)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise StorageError(
            f"Cannot write the plot {file}: {error.strerror}. Choose another --plot."
        ) from error
    finally:
        pyplot.close(figure)
