"""The quickstart's world: a tiny base, four nodes at two companies, and when it is enough.

In: nothing. Out: `QUICKSTART`. The settings are ordinary ones (edge_node/settings.py,
central/settings.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edge_node.settings import EnvironmentSpec
from examples.quickstart import recipe
from examples.quickstart.environments import Node
from examples.quickstart.traffic import ASKING
from examples.quickstart.world import (
    Bar,
    NodePlan,
    Report,
    Size,
    StopAt,
    World,
    in_words,
)

NODES: Mapping[Node, NodePlan] = {
    plan.key: plan
    for plan in (
        NodePlan("A", "shared", "acme-a"),
        NodePlan("B", "shared", "acme-b"),
        NodePlan("C", "shared", "acme-c", learns=False),
        NodePlan("D", "zeta", "zeta-d"),
    )
}

SIZES: Mapping[str, Size] = {
    "full": Size(
        name="full",
        nodes=("A", "B", "C", "D"),
        first_wave=recipe.FIRST_WAVE,
        next_wave=recipe.NEXT_WAVE,
        measured_tasks=100,
        max_releases=7,
        learning_limit_s=360,
        settle_limit_s=60,
        stop_at=StopAt(96, 70, 94),
        stop_late_at=StopAt(94, 66, 92),
        patience_s=150,
    ),
    "small": Size("small", ("A", "B"), 150, 60, 50, 2, 240, 60, None),
}

FEEDBACK_SHARE = 0.95
"""Share of a wave whose feedback a round waits for."""
MIN_FAILURES_ALONE = 5
"""Failures of the serving release's own answers that start another round at a node that is alone in
its cohort. Nodes that share a cohort rehearse on every release instead (0): a merge of one node's
increment wears the other's away.
"""

CENTRAL: Mapping[str, str] = {
    # The shared cohort merges when both learning nodes have sent something; a slow one holds nobody
    # up for long.
    "CENTRAL_MERGE__MIN_UPDATES": "2",
    "CENTRAL_MERGE__MAX_AGE_S": "60",
    "CENTRAL_MERGE__COHORTS": json.dumps({"zeta": {"min_updates": 1}}),
    **recipe.MERGE,
    "CENTRAL_GATE__TASKS": "50",
    # One look decides: further ones would cost minutes on two cores.
    "CENTRAL_GATE__MAX_TASKS": "50",
    "CENTRAL_GATE__DEADLINE_S": "60",
    # How far own work and what the base could do may fall below the best release so far before a
    # candidate is rejected. The releases of a cohort that learns still swing in their own work;
    # base skill does not.
    "CENTRAL_GATE__TOLERANCE_POINTS": "20",
    "CENTRAL_GATE__ANCHOR_TOLERANCE_POINTS": "10",
}


def min_failures(cohort: str) -> int:
    """New failures before another round of a node in `cohort`."""
    return 0 if is_shared(cohort) else MIN_FAILURES_ALONE


def is_shared(cohort: str) -> bool:
    """Whether several nodes of the demo learn in this cohort."""
    return cohort == "shared"


def edge_settings(size: Size, cohort: str) -> dict[str, str]:
    """What the nodes of one cohort have in common."""
    return {
        "EDGE_SERVING__DTYPE": "float32",
        "EDGE_SERVING__MAX_MODEL_LEN": "128",
        "EDGE_SERVING__MAX_LORA_RANK": "32",
        **(recipe.LEARNING if is_shared(cohort) else recipe.LEARNING_ALONE),
        "EDGE_LEARNING__MIN_EXAMPLES": str(round(FEEDBACK_SHARE * size.first_wave)),
        "EDGE_LEARNING__MIN_NEW_FEEDBACK": str(round(FEEDBACK_SHARE * size.next_wave)),
        "EDGE_LEARNING__MIN_NEW_FAILURES": str(min_failures(cohort)),
        # After a rejected candidate the next round starts from the same release.
        "EDGE_LEARNING__SUPERSEDE_AFTER_S": "60",
        # Every release stays loaded until the end, when each is asked what the base could do.
        "EDGE_RELEASES__KEEP": "16",
    }


def own_work(plan: NodePlan, seed: int) -> EnvironmentSpec:
    return EnvironmentSpec(
        name=plan.environment,
        factory="examples.quickstart.environments:CompanyApi",
        options={"node": plan.key, "seed": seed},
    )


def base_skill(seed: int) -> EnvironmentSpec:
    return EnvironmentSpec(
        name="public",
        factory="examples.quickstart.environments:PublicTenants",
        options={"seed": seed},
        anchor=True,
    )


def bars(report: Report) -> list[Bar]:
    after, before, anchors = (
        report["success"]["after"],
        report["success"]["before"],
        report["anchor"]["after"],
    )
    mean = (after["A"] + after["B"]) / 2
    return [
        Bar(
            "before: A, B, C and D at most 5 %",
            in_words(before),
            all(value <= 5 for value in before.values()),
        ),
        Bar(
            "after: mean of A and B at least 90 %",
            f"{mean:.1f} ({after['A']:.0f}, {after['B']:.0f})",
            mean >= 90,
        ),
        Bar("after: C, which never trained, at least 60 %", f"{after['C']:.1f}", after["C"] >= 60),
        Bar("after: D, with its own cohort, at least 90 %", f"{after['D']:.1f}", after["D"] >= 90),
        Bar(
            f"after: what the base could do, at least {LOWEST_ANCHOR} % on every node",
            in_words(anchors),
            min(anchors.values()) >= LOWEST_ANCHOR,
        ),
    ]


LOWEST_ANCHOR = 85

QUICKSTART = World(
    name="quickstart",
    title="Lorikeet quickstart",
    seed_chooses="the companies' code books, the tasks, and the nodes' sampling; "
    "the base model is the same",
    model="examples.quickstart.model",
    sizes=SIZES,
    nodes=NODES,
    own=own_work,
    anchor=base_skill,
    asking=ASKING,
    central=CENTRAL,
    edge=edge_settings,
    min_failures=min_failures,
    bars=bars,
    lowest_anchor=lambda report: LOWEST_ANCHOR,
    example_prompt="[acme/desk] ticket 7630: move in lyon with normal priority",
)
