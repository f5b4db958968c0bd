"""Rounds and bytes of a federation, beside nodes alone and one learner with all data."""
