"""Names of what the factors of an increment or a release travel as. rounding.py has the numbers.

Importing this loads nothing: settings and manifests name encodings too.
"""

from __future__ import annotations

from typing import Literal, get_args

Encoding = Literal["float32", "bf16", "int8"]

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
DTYPES: dict[Encoding, str] = {"float32": "F32", "bf16": "BF16", "int8": "I8"}
"""Dtype of a factor in the header of a safetensors file."""
