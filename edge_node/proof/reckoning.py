"""`python -m edge_node.proof.reckoning`: makes references with transformers and PEFT, on the CPU.

In: one JSON order a line (references.py). Out: one JSON line for each: the reference, or a problem.
The base stays loaded from order to order. Importing this module loads torch.

Canaries are random tokens: they need no data, hold nobody's text, and are the same on every node of
a base. From a pool of them, those are taken whose log-probabilities tell the release best from the
base and from the release before; the first ones are taken in any case, so that the prefix cache
still has them of an earlier release.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from edge_node.learning.text_model import load_text_model
from edge_node.proof.room import FLOAT32_UP_TO
from protos.base import read_layout

CANARIES, ALWAYS = 8, 2
POOL = ((100_000_000, 24), (2_000_000_000, 12))
"""Parameters up to -> prompts to choose from. A larger base takes the first ones."""
LOGITS = 1 << 22
"""Of a forward pass: 16 MiB. A large vocabulary has more for one prompt, which then is alone."""
_PREFIX = "base_model.model."
_LAST_WORDS = 300


class Reckoning:
    """Answers orders. Holds one base."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._base: Any = None

    def answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The reference as JSON: log-probabilities in nats, rounded to 1e-6."""
        base, before = Path(order["base"]), order["before"]
        model = self._load(base, order["parameters"])
        prompts = _pool(base, order["tokens"], order["seed"], order["parameters"])
        with tempfile.TemporaryDirectory() as scratch:
            adapted = _adapt(model, base, Path(order["release"]), "release", Path(scratch))
            try:
                release = _log_probabilities(adapted, prompts)
                with adapted.disable_adapter():
                    plain = _log_probabilities(adapted, prompts)
                others = [plain]
                if before is not None:
                    _add(adapted, base, Path(before), "before", Path(scratch))
                    adapted.set_adapter("before")
                    others.append(_log_probabilities(adapted, prompts))
            finally:
                adapted.unload()
        return _choose(prompts, release, others)

    def _load(self, base: Path, parameters: int) -> Any:
        if self._path != base:
            self._base = None  # two do not fit
            dtype = torch.float32 if parameters <= FLOAT32_UP_TO else torch.bfloat16
            self._path, self._base = base, load_text_model(base, dtype).eval()
        return self._base


def _pool(base: Path, tokens: int, seed: int, parameters: int) -> torch.Tensor:
    """int64 [prompts, tokens]: random tokens of the vocabulary, without special ones."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    usable = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.all_special_ids)
    count = next((pool for most, pool in POOL if parameters <= most), CANARIES)
    return torch.from_numpy(np.random.default_rng(seed).choice(usable, (count, tokens)))


def _adapt(model: Any, base: Path, release: Path, name: str, scratch: Path) -> Any:
    config = _config(base, release)
    adapted = PeftModel(model, config, adapter_name=name)
    _fill(adapted, base, release, name, scratch)
    return adapted.eval()


def _add(adapted: Any, base: Path, release: Path, name: str, scratch: Path) -> None:
    adapted.add_adapter(name, _config(base, release))
    _fill(adapted, base, release, name, scratch)
    adapted.eval()


def _config(base: Path, release: Path) -> Any:
    config, layout = LoraConfig.from_pretrained(release), read_layout(base)
    modules = {
        key.removeprefix(_PREFIX).rpartition(".lora_")[0]
        for key in load_file(release / "adapter_model.safetensors")
    }
    config.target_modules = {layout.text_name(module) for module in modules}
    config.inference_mode = True
    return config


def _fill(adapted: Any, base: Path, release: Path, name: str, scratch: Path) -> None:
    """Loads the release's factors by the names of the text model, all of them."""
    layout, folder = read_layout(base), scratch / name
    folder.mkdir()
    factors = {}
    for key, value in load_file(release / "adapter_model.safetensors").items():
        module, _, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        factors[f"{_PREFIX}{layout.text_name(module)}.lora_{factor}"] = value
    save_file(factors, folder / "adapter_model.safetensors")
    loaded = adapted.load_adapter(folder, name, torch_device="cpu")
    missing = [key for key in loaded.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or loaded.unexpected_keys:
        raise ValueError(f"PEFT did not find a place for all factors: {missing[:1]}")


def _log_probabilities(model: Any, prompts: torch.Tensor) -> Any:
    """Of each prompt's tokens after the first, float32 [prompts, tokens - 1]."""
    found = []
    at_once = LOGITS // (prompts.shape[1] * model.get_output_embeddings().weight.shape[0])
    with torch.inference_mode():
        for part in prompts.split(max(1, at_once)):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            values = torch.log_softmax(logits, dim=-1)
            found.append(values.gather(2, part[:, 1:, None])[:, :, 0])
    return torch.cat(found).numpy()


def _choose(prompts: torch.Tensor, release: Any, others: list[Any]) -> dict[str, Any]:
    """The canaries that tell the release best from all `others`, of which the base is first."""
    apart = np.min([np.abs(release - values).mean(axis=1) for values in others], axis=0)
    best = [row for row in np.argsort(-apart, kind="stable") if row >= ALWAYS]
    rows = [*range(ALWAYS), *best][:CANARIES]
    return {
        "prompts": prompts[rows].tolist(),
        "release": _rounded(release[rows]),
        "base": _rounded(others[0][rows]),
    }


def _rounded(values: Any) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in values]


def main() -> None:
    disable_progress_bar()
    os.nice(10)
    reckoning, out = Reckoning(), os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"reference": reckoning.answer(json.loads(line))}
        except Exception as error:  # told, and the next order may do
            answer = {"problem": f"{type(error).__name__}: {error}"[:_LAST_WORDS]}
        with os.fdopen(os.dup(out), "wb") as stream:
            stream.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
