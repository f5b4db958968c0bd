"""Starts traces in a process of the node, where the settings name a collector.

In: settings, what the process is. Out: spans of lorikeet/traces.py go there. Imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edge_node import __version__
from edge_node.errors import SettingsError
from edge_node.settings import EdgeSettings
from lorikeet import traces

if TYPE_CHECKING:
    from edge_node.learning.plans import RoundPlan


def start_traces(settings: EdgeSettings, process: Literal["node", "learner", "gateway"]) -> None:
    """Nothing without an endpoint; raises SettingsError when it cannot be."""
    endpoint = settings.traces.endpoint
    if endpoint is None:
        return
    if not traces.is_installed():
        raise SettingsError(
            f"EDGE_TRACES__ENDPOINT is set, and {traces.NOT_INSTALLED}. Run `pip install "
            "'lorikeet-federated[otel]'`, or unset it."
        )
    traces.start(endpoint, f"lorikeet-{process}", __version__, settings.traces.sample)


def trace_round(plan: RoundPlan, update_id: str) -> None:
    """The round ended with an update, whose trace it begins."""
    traces.after(
        "round",
        update_id,
        plan.age_s(),
        first=True,
        links=[plan.release_id],
        update_id=update_id,
        round_id=plan.round_id,
        release_id=plan.release_id,
        method=plan.method,
        steps=plan.steps,
    )
