"""Lorikeet under Flower's simulation, with virtual nodes; see README.md."""
