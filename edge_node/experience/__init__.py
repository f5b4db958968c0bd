"""Experience: interactions and feedback enter; what can be learnt, and counts, leave."""

from edge_node.experience.comparisons import Answer, Group, Pair, Preference, Scores
from edge_node.experience.opening import describe_experience, open_experience
from edge_node.experience.records import (
    ANYONE,
    Choice,
    Counts,
    EpisodeFeedback,
    Example,
    Feedback,
    Interaction,
    Receipt,
    Teller,
    Thumb,
    Told,
)
from edge_node.experience.store import ExperienceStore
from edge_node.experience.trimming import Trimmer
from edge_node.experience.waiting import Said, interactions_of

__all__ = [
    "ANYONE",
    "Answer",
    "Choice",
    "Counts",
    "EpisodeFeedback",
    "Example",
    "ExperienceStore",
    "Feedback",
    "Group",
    "Interaction",
    "Pair",
    "Preference",
    "Receipt",
    "Said",
    "Scores",
    "Teller",
    "Thumb",
    "Told",
    "Trimmer",
    "describe_experience",
    "interactions_of",
    "open_experience",
]
