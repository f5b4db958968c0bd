"""What the node has to learn from, as the policy sees it.

In: the stores of experience and rounds, and the release that is served. Out: Signals
(`policy.py`), and the sizes of scored groups for a plan. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_node.experience import Counts, ExperienceStore
from edge_node.learning.feedback_plan import GroupSizes
from edge_node.learning.policy import Method, Signals
from edge_node.learning.records import RoundStore


def read_signals(
    experience: ExperienceStore,
    counts: Counts,
    rounds: RoundStore,
    cursors: Mapping[Method, int],
    release_id: str,
    model: str,
) -> Signals:
    """model: the served name of the active release, `release_id`. Without the rollouts."""
    last, sft = rounds.last(), cursors["sft"]
    # Thumbs of a kto round that an operator ended are not learnt by another method instead.
    thumbs = max(sft, rounds.cancelled_cursor("kto"))
    new_groups = experience.new_comparisons("group", after=cursors["scored"], model=model)
    # Not counted where none is new: no round would start.
    groups = new_groups and experience.count_groups(up_to=experience.cursor(), model=model)
    return Signals(
        examples=counts.examples,
        new_failures=experience.failures(after=thumbs, model=model),
        new_feedback=experience.judged(after=thumbs, model=model),
        new_corrections=experience.corrections(after=sft, model=model),
        preferences=counts.preferences,
        new_preferences=experience.new_comparisons("preference", after=cursors["dpo"]),
        groups=groups,
        new_groups=new_groups,
        liked=counts.liked,
        disliked=counts.disliked,
        # An sft round from the same release took them for failures.
        new_dislikes=experience.dislikes(after=max(sft, cursors["kto"]), model=model),
        same_start_age_s=last.age_s() if last and last.release_id == release_id else None,
        start_is_explored=rounds.explored(release_id),
        was_unrewarded=rounds.unrewarded(release_id) and rounds.ends(1)[0].state == "no reward",
        sent=rounds.sent(release_id),
    )


def group_sizes(
    experience: ExperienceStore, cursor: int, before: int, model: str, limit: int
) -> GroupSizes:
    """Of the groups that a scored round at `cursor` trains on; `before`: the cursor of the last
    such round.
    """
    groups = experience.groups(up_to=cursor, limit=limit, model=model)
    every = experience.new_comparisons("group", after=before)
    return GroupSizes(
        count=len(groups),
        samples=max((len(group.answers) for group in groups), default=2),
        tokens=max((len(answer) for group in groups for answer in group.answers), default=1),
        stale=every - experience.new_comparisons("group", after=before, model=model),
    )
