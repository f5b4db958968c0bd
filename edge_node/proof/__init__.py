"""Proof of serving: a release that vLLM is to serve enters; nothing leaves, or what is wrong."""

from edge_node.proof.proof import Proof, make_proof

__all__ = ["Proof", "make_proof"]
