"""Experience: captured interactions and feedback enter; examples to learn from and counts of failures leave."""

from edge_node.experience.store import Counts, Example, ExperienceStore, Feedback, Interaction, Receipt

__all__ = ["Counts", "Example", "ExperienceStore", "Feedback", "Interaction", "Receipt"]
