"""Merging: weighted low-rank increments and the parent enter; a release of rank R or less leaves.

Pure functions of arrays: no I/O, no Flower, no gRPC, no database.
"""

from central.merging.filters import Selection, clip_norms, keep_near, multi_krum, product_gram
from central.merging.product import Merged, ProductSum, merge
from central.merging.threads import one_thread

__all__ = [
    "Merged",
    "ProductSum",
    "Selection",
    "clip_norms",
    "keep_near",
    "merge",
    "multi_krum",
    "one_thread",
    "product_gram",
]
