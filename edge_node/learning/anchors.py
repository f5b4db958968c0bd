"""Anchors of a real model: the base's own samples, and what the base made of them.

In: a directory that `edge-node anchors make` wrote (`make_anchors.py`). Out: samples in token ids,
and the base's last hidden states, from which the round's teacher makes its logits
(`teacher.py`). Guarantees: they are whole, and of this base. Loads no torch but in `read_states`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from edge_node.errors import SettingsError
from protos.checkpoint import BaseModelError, TensorInfo, read_header
from protos.manifest import Digest, Document, ManifestError, sha256_hex

INDEX_FILE, STATES_FILE, STATES = "anchors.json", "hidden.safetensors", "hidden"
"""The two files, and the one tensor of the second: bfloat16 [tokens, hidden]."""
SETTING = "EDGE_LEARNING__ANCHORS"

Kind = Literal["plain", "open", "qa"]
"""plain: text without a prompt. open: answers to open questions. qa: answers that were right."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Sample(Document):
    """A prompt and what the base wrote after it."""

    kind: Kind
    ids: list[int] = Field(min_length=2)
    """Token ids of prompt and answer."""
    prompt: int = Field(ge=1)
    """How many of them are the prompt."""

    @model_validator(mode="after")
    def _has_an_answer(self) -> Sample:
        if self.prompt >= len(self.ids):
            raise ValueError(f"{self.prompt} of {len(self.ids)} tokens are prompt; expected fewer")
        return self


class AnchorIndex(Document):
    """`anchors.json`: the samples, in the order of the rows of the hidden states."""

    format: Literal[1] = 1
    base: Digest
    """Of the model that wrote them."""
    seed: int
    dtype: str
    """In which the base computed."""
    samples: list[Sample] = Field(min_length=1)
    hidden_sha256: Digest
    """Of `hidden.safetensors`."""


@dataclass(frozen=True)
class Anchors:
    """digest: SHA-256 of `anchors.json`, and so of everything."""

    path: Path
    digest: str
    samples: list[Sample]


def summary(samples: Sequence[Sample]) -> str:
    """How many of each kind there are, e.g. `64 plain, 32 open, 40 qa`."""
    counts = Counter(sample.kind for sample in samples)
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)


def anchors_digest(path: Path) -> str:
    """The digest of the anchors in this directory, unchecked; raises SettingsError."""
    return sha256_hex(_read_index(path))


def read_anchors(path: Path, base: str) -> Anchors:
    """The anchors in this directory, each file checked.

    Args:
        base: digest of the node's base model.

    Raises:
        SettingsError: they are missing, damaged, or another base's.
    """
    data = _read_index(path)
    try:
        index = AnchorIndex.from_bytes(data)
    except ManifestError as error:
        raise _damaged(path, f"{INDEX_FILE} cannot be read: {error}") from error
    if index.base != base:
        raise SettingsError(
            f"{SETTING}: the anchors in {path} were made by base {index.base[:12]}; this node's "
            f"base is {base[:12]}. Run `edge-node anchors make --out DIR` on this base, and set "
            f"{SETTING} to the new directory."
        )
    try:
        with (path / STATES_FILE).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        tensors = read_header(path / STATES_FILE)
    except (OSError, BaseModelError) as error:
        raise _damaged(path, f"{STATES_FILE} cannot be read: {error}") from error
    if found != index.hidden_sha256:
        raise _damaged(
            path,
            f"{STATES_FILE} has SHA-256 {found[:12]}, {INDEX_FILE} says {index.hidden_sha256[:12]}",
        )
    tokens = sum(len(sample.ids) for sample in index.samples)
    states = tensors.get(STATES, TensorInfo("", ()))
    if states.dtype != "BF16" or len(states.shape) != 2 or states.shape[0] != tokens:
        raise _damaged(
            path,
            f"{STATES_FILE} holds {_said(tensors)}; expected {STATES}, BF16 [{tokens}, hidden]",
        )
    return Anchors(path, sha256_hex(data), index.samples)


def read_states(anchors: Anchors) -> list[Any]:
    """The base's last hidden states of each sample, torch.bfloat16 [tokens, hidden]."""
    from safetensors.torch import load_file

    states = load_file(anchors.path / STATES_FILE)[STATES]
    return list(states.split([len(sample.ids) for sample in anchors.samples]))


def _read_index(path: Path) -> bytes:
    try:
        return (path / INDEX_FILE).read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{SETTING}: there are no anchors in {path}: {error.strerror}. Make them with "
            f"`edge-node anchors make --out DIR`, and set {SETTING} to that directory."
        ) from error


def _damaged(path: Path, what: str) -> SettingsError:
    return SettingsError(
        f"{SETTING}: the anchors in {path} are damaged: {what.rstrip('.')}. Delete the directory, "
        f"and make it again with `edge-node anchors make --out {path}`."
    )


def _said(tensors: dict[str, TensorInfo]) -> str:
    return ", ".join(
        f"{name}, {tensor.dtype} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())
    )
