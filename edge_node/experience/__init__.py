"""Experience: interactions and feedback enter; what can be learnt, and counts, leave."""

from edge_node.experience.comparisons import Answer, Group, Pair, Preference, Receipt, Scores
from edge_node.experience.store import (
    Choice,
    Counts,
    Example,
    ExperienceStore,
    Feedback,
    Interaction,
    Thumb,
)

__all__ = [
    "Answer",
    "Choice",
    "Counts",
    "Example",
    "ExperienceStore",
    "Feedback",
    "Group",
    "Interaction",
    "Pair",
    "Preference",
    "Receipt",
    "Scores",
    "Thumb",
]
