"""Safetensors files that no writer would make."""

from __future__ import annotations

import json
import struct
from typing import Any


def payload_file(
    tensors: dict[str, tuple[str, list[int], bytes]], scales: dict[str, float]
) -> bytes:
    """A payload from its tensors, valid or not: name -> dtype, shape, content."""
    text = json.dumps({"format": 1, "scales": scales})
    header: dict[str, Any] = {"__metadata__": {"lorikeet": text}}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += content
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text.encode() + body
