"""Which vLLM arguments an operator may add, and which ones the node sets itself.

In: EDGE_SERVING__EXTRA_ARGS. Out: one line per argument that the node cannot work with: its name
and what to do instead. Guarantees: a value is never quoted, because it may be a secret. Knows
vLLM 0.32's ways to write a name: `--a_b`, `--a=1`, `--a.key 1`, abbreviations and short names.
Imports nothing heavy; tests/contract/test_vllm_arguments.py compares it with vLLM's own parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_ONE_ENGINE = "a node is one vLLM on one machine, which it starts, probes and stops itself"
_FILES = "the learner reads the base from its files: change them, on central and on every node"
_LOGGED = "it writes prompts or answers into logs/vllm.log"
_RELEASES = "the node loads central's releases itself"

REFUSED: dict[str, str] = {
    "--": "names come before values",
    "--help": "it ends vLLM",
    "-h": "it ends vLLM",
    "--config": "write its arguments into EDGE_SERVING__EXTRA_ARGS itself",
    # What has a setting of the node.
    "--model": "set EDGE_BASE__PATH",
    "--served-model-name": "set EDGE_SERVING__ALIAS",
    "--host": "set EDGE_SERVING__HOST",
    "--port": "set EDGE_SERVING__PORT",
    "--dtype": "set EDGE_SERVING__DTYPE",
    "--max-model-len": "set EDGE_SERVING__MAX_MODEL_LEN",
    "--max-loras": "set EDGE_SERVING__MAX_LORAS",
    "--max-lora-rank": "set EDGE_SERVING__MAX_LORA_RANK",
    "--max-cpu-loras": "set EDGE_SERVING__MAX_CPU_LORAS",
    # Where the endpoint is.
    "--uds": "set EDGE_SERVING__HOST and EDGE_SERVING__PORT; the endpoint is a TCP port",
    "--root-path": "let the proxy in front strip its prefix; the node's routes begin with /v1",
    "--grpc": "clients speak HTTP to a node",
    "--grpc-port": "clients speak HTTP to a node",
    "--tokens-only": "clients send text to a node",
    "--ssl-certfile": "set EDGE_SERVING__TLS__CERT_FILE",
    "--ssl-keyfile": "set EDGE_SERVING__TLS__KEY_FILE",
    "--enable-ssl-refresh": "a renewed certificate is always read again",
    # The node checks keys of its own, and both would come in one header.
    "--api-key": "make keys with `edge-node keys create`, and set EDGE_SERVING__ACCESS=required",
    # Privacy: prompts and answers are kept in the experience store alone.
    "--enable-log-requests": _LOGGED,
    "--enable-log-outputs": _LOGGED,
    # Adapters.
    "--enable-lora": "it is always on",
    "--no-enable-lora": "releases are LoRA adapters",
    "--lora-modules": _RELEASES,
    "--default-mm-loras": _RELEASES,
    "--lora-target-modules": "a release would lose its other modules without a word",
    # The model is the base that central knows, and it writes text.
    "--runner": "a node generates text",
    "--convert": "a node generates text",
    "--skip-tokenizer-init": "a node generates text",
    "--load-format": _FILES,
    "--config-format": _FILES,
    "--tokenizer": _FILES,
    "--tokenizer-mode": _FILES,
    "--hf-config-path": _FILES,
    "--hf-overrides": _FILES,
    "--model-class-overrides": _FILES,
    # Processes.
    "--worker-extension-cls": "the node extends the workers itself, to see which weights they hold",
    "--shutdown-timeout": "the node drains vLLM itself before it stops it",
    "--api-server-count": _ONE_ENGINE,
    "-asc": _ONE_ENGINE,
    "--headless": _ONE_ENGINE,
    "--nnodes": _ONE_ENGINE,
    "-n": _ONE_ENGINE,
    "--node-rank": _ONE_ENGINE,
    "-r": _ONE_ENGINE,
    "--data-parallel-rank": _ONE_ENGINE,
    "-dpn": _ONE_ENGINE,
    "--data-parallel-start-rank": _ONE_ENGINE,
    "-dpr": _ONE_ENGINE,
    "--data-parallel-hybrid-lb": _ONE_ENGINE,
    "-dph": _ONE_ENGINE,
    "--data-parallel-external-lb": _ONE_ENGINE,
    "-dpe": _ONE_ENGINE,
    "--data-parallel-multi-port-external-lb": _ONE_ENGINE,
    "-dpm": _ONE_ENGINE,
}
"""Argument -> what to do instead, or why not."""
_BEGIN_LIKE_REFUSED = frozenset({"-dp"})
"""Full names of vLLM that a refused name begins with: they are no abbreviation of it."""


def mistakes(arguments: Sequence[str]) -> list[str]:
    """One line for each of `arguments` that a node cannot work with; empty when all are fine."""
    if arguments and not arguments[0].startswith("-"):
        return ["the first item is no argument; expected a name such as --seed"]
    found = []
    for name in names(arguments):
        if glued := re.match(r"--[a-z][a-z0-9-]*(?=\s)", name):
            found.append(f"{glued[0]} is in one item with its value; make two items of them")
        elif refused := _refused(name):
            found.append(f"{name} is not possible: {REFUSED[refused]}")
    return found


def names(arguments: Sequence[str]) -> Iterator[str]:
    """The names among `arguments`, with dashes for underscores as vLLM reads them."""
    for item in arguments:
        if item.startswith("-"):
            name = item.partition("=")[0].partition(".")[0]
            yield name.replace("_", "-") if name.startswith("--") else name


def value(arguments: Sequence[str], name: str) -> str | None:
    """The last value of `name` in `arguments`, as vLLM takes it; None when it is not there."""
    for place in reversed(range(len(arguments))):
        if next(names(arguments[place : place + 1]), None) == name:
            _, equals, given = arguments[place].partition("=")
            return given if equals else next(iter(arguments[place + 1 : place + 2]), None)
    return None


def _refused(name: str) -> str | None:
    """The refused argument that vLLM would take `name` for."""
    if name in REFUSED:
        return name
    if name in _BEGIN_LIKE_REFUSED or name == "-":
        return None
    for refused in REFUSED:
        glued = len(refused) == 2 and name.startswith(refused) and name[1] != "-"  # -n2
        if refused.startswith(name) or glued:
            return refused
    return None
