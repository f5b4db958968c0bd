"""Records payloads in each encoding: `python -m tests.golden.record_encodings <folder>`.

In: the folder of a version. Out: its folder encodings/, which test_formats.py reads: one payload
and the digest of the float32 payload that it is read as, for each encoding. What is there already
is never written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protos.encoding import ENCODINGS
from protos.lora import decode, encode
from protos.manifest import sha256_hex
from tests.golden.record_formats import RANKS, payload


def main() -> None:
    folder = Path(sys.argv[1]) / "encodings"
    folder.mkdir()
    for encoding in ENCODINGS:
        data = encode(decode(payload(max(RANKS))), encoding)
        (folder / f"{encoding}.safetensors").write_bytes(data)
        (folder / f"{encoding}.sha256").write_text(f"{sha256_hex(encode(decode(data)))}\n")


if __name__ == "__main__":
    main()
