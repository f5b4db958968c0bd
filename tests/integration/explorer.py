"""A grpo round in a process of its own, so that it can be killed.

In: files of settings and plan, the start release's directory, a workspace; the node's vLLM runs.
Out: the round's checkpoints in the workspace.

Run: `python -m tests.integration.explorer SETTINGS PLAN RELEASE WORKSPACE`.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from edge_node.learning.exploration import train_on_verifiers
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import NoGain
from edge_node.learning.workplace import find_workplace
from edge_node.settings import EdgeSettings


def main(settings: Path, plan: Path, release: Path, workspace: Path) -> None:
    planned = RoundPlan.model_validate_json(plan.read_bytes())
    node = EdgeSettings.model_validate_json(settings.read_bytes())
    with suppress(NoGain):
        train_on_verifiers(planned, node, find_workplace(planned, node, release, workspace))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
