"""Silent failures of an engine, made on purpose: a `vllm.general_plugins` entry point of the tests.

In: the file that LORIKEET_TEST_FAULT names, read at each load: a fault, another directory. Out:
vLLM's own worker, which does that to the adapter and says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RENAMED = "language_model."
"""A prefix that the tiny model's modules do not have."""


def install() -> None:
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    load, add, mapped = (
        Manager._load_adapter,
        Manager.add_adapter,
        LoRAModelManager._set_adapter_mapping,
    )
    ignored: set[int] = set()

    def load_adapter(self: Any, request: Any) -> Any:
        fault = _fault()
        if fault == "swapped":
            request = type(request)(request.lora_name, request.lora_int_id, _other())
        adapter = load(self, request)
        if fault in CHANGES:
            CHANGES[fault](adapter.loras)
        return adapter

    def add_adapter(self: Any, request: Any) -> bool:
        if _fault() == "not_delivered":
            return True
        if _fault() == "ignored":
            ignored.add(request.lora_int_id)
        return add(self, request)

    def set_mapping(self: Any, mapping: Any) -> None:
        if ignored and _fault() == "ignored":
            drop = lambda ids: tuple(0 if one in ignored else one for one in ids)  # noqa: E731
            mapping = type(mapping)(
                drop(mapping.index_mapping), drop(mapping.prompt_mapping), mapping.is_prefill
            )
        mapped(self, mapping)

    Manager._load_adapter, Manager.add_adapter = load_adapter, add_adapter
    LoRAModelManager._set_adapter_mapping = set_mapping


def _fault() -> str:
    return _words()[0]


def _other() -> str:
    """The directory that is read instead."""
    return _words()[1]


def _words() -> list[str]:
    path = Path(os.environ["LORIKEET_TEST_FAULT"])
    return path.read_text().split() if path.is_file() else [""]


def _rename(loras: dict[str, Any], name: Callable[[str], str]) -> None:
    for module in list(loras):
        loras[name(module)] = loras.pop(module)


def _scale(loras: dict[str, Any], factor: float) -> None:
    for lora in loras.values():
        lora.lora_b *= factor


def _zero_one(loras: dict[str, Any]) -> None:
    loras[min(name for name in loras if name.endswith("up_proj"))].lora_b.zero_()


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no_op": lambda loras: _scale(loras, 0.0),
    "scaled": lambda loras: _scale(loras, 0.5),
    "zeroed": _zero_one,
    "prefix": lambda loras: _rename(loras, lambda module: f"{RENAMED}{module}"),
    "disjoint": lambda loras: _rename(loras, lambda module: f"{module}_of_another"),
}
"""What a fault does to the factors that vLLM read, by module."""
