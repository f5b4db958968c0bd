"""Text models inside wrappers (for images), served by vLLM without the wrapper.

In: a base whose config.json holds `text_config` and whose weights are named `language_model.*`.
Out: vLLM model classes that take that config and those weights alone, so that the vision part needs
no memory and no torchvision. Adapters keep the checkpoint's module names. Loaded by vLLM by name;
`register` only names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.base import WRAPPED_TEXT, read_layout

if TYPE_CHECKING:
    import torch

_PREFIX = "LanguageModelOf"
_OUTSIDE = ("vision_tower.", "multi_modal_projector.", "vision_model.")


def architecture(base: Path) -> str:
    """The class that serves the text model of the wrapper at `base`; read_layout checked it."""
    kind = json.loads((base / "config.json").read_bytes())["text_config"]["model_type"]
    return f"{_PREFIX}{WRAPPED_TEXT[kind]}"


def register() -> None:
    """Make the classes known to vLLM in this process; loads none of them."""
    from vllm import ModelRegistry

    for name in WRAPPED_TEXT.values():
        ModelRegistry.register_model(f"{_PREFIX}{name}", f"{__name__}:{_PREFIX}{name}")


def __getattr__(name: str) -> Any:
    """vLLM asks for a class by its name; only then is the model it stands on imported."""
    if name.removeprefix(_PREFIX) not in WRAPPED_TEXT.values() or not name.startswith(_PREFIX):
        raise AttributeError(name)
    globals()[name] = _alone(name)
    return globals()[name]


def _alone(name: str) -> type:
    from vllm import ModelRegistry
    from vllm.model_executor.models.utils import WeightsMapper

    architecture_name = name.removeprefix(_PREFIX)
    text: Any = ModelRegistry.models[architecture_name].load_model_cls()
    renames: dict[str, str | None] = {
        f"{model}{part}": None for part in _OUTSIDE for model in ("", "model.")
    }
    renames |= {"model.language_model.": "model.", "language_model.": ""}
    mapper = WeightsMapper(orig_to_new_prefix=renames)
    own_mapper = getattr(text, "hf_to_vllm_mapper", None)

    class Alone(text):  # type: ignore[misc]
        """Renames the weights, and adapters by `hf_to_vllm_mapper`.

        The rest is the text model's own.
        """

        hf_to_vllm_mapper = mapper if own_mapper is None else mapper | own_mapper

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            inside = vllm_config.model_config.hf_config.get_text_config()
            # The wrapper's own word on this and its text model's differ: what is stored tells.
            inside.tie_word_embeddings = not read_layout(
                Path(vllm_config.model_config.model)
            ).has_head
            super().__init__(
                vllm_config=vllm_config.with_hf_config(inside, architectures=[architecture_name]),
                prefix=prefix,
            )

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            loaded: set[str] = super().load_weights(mapper.apply(weights))
            return loaded

    Alone.__name__ = Alone.__qualname__ = name
    return Alone
