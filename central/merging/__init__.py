"""Merging: weighted low-rank increments and the parent release enter; one release of rank at most R leaves.

Pure functions of arrays: no I/O, no Flower, no gRPC, no database.
"""

from central.merging.product import Merged, ProductSum, merge

__all__ = ["Merged", "ProductSum", "merge"]
