"""Flower strategies: the updates of a plan enter; the arrays of its candidate leave."""
