"""Lorikeet under Flower's simulation: the node's ClientApp and central's ServerApp with virtual nodes; see README.md."""
