"""The digest of the weights that produce an answer, in its header and body.

In: a version's directory at its load; the version of each request. Out: the header
`x-lorikeet-weights`, and `system_fingerprint` in the body of a completion (of a stream: in its last
event). Guarantees: of a release it is the digest of the payload that central signed, with `/r8`
where the node serves the first 8 pairs alone; of another adapter that of its file, and of the base
alone the base's digest.
"""

from __future__ import annotations

import hashlib
import importlib
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from edge_node.disk import read_json
from edge_node.errors import ServingError
from edge_node.serving.held import ADAPTER_FILE
from protos.manifest import ManifestError, ReleaseManifest

WEIGHTS_HEADER = b"x-lorikeet-weights"
WEIGHTS: ContextVar[str] = ContextVar("weights", default="")
"""Of the version that this request was bound to; empty for a model that is not known."""
_OWN = "system_fingerprint"


def weights_digest(path: Path) -> str:
    """Of an adapter's directory; raises ServingError when it cannot be read."""
    try:
        manifest = path / "manifest.json"
        if not manifest.is_file():
            with (path / ADAPTER_FILE).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        release = ReleaseManifest.from_bytes(manifest.read_bytes())
        rank = int(read_json(path / "adapter_config.json")["r"])
        part = f"/r{rank}" if rank < release.rank else ""
        return f"{release.payload.digest_sha256}{part}"
    except (OSError, ValueError, KeyError, TypeError, ManifestError) as error:
        raise ServingError(f"The weights in {path} have no digest: {error!r}.") from error


def name_weights() -> None:
    """From now on vLLM writes WEIGHTS of a request as its `system_fingerprint`.

    vLLM's own is one text for the whole server; it stays where WEIGHTS is not set.
    """
    module = importlib.import_module("vllm.entrypoints.generate.base.serving")

    def read(serving: Any) -> str | None:
        return WEIGHTS.get() or serving.__dict__.get(_OWN)

    def write(serving: Any, value: str | None) -> None:
        serving.__dict__[_OWN] = value

    setattr(module.GenerateBaseServing, _OWN, property(read, write))
