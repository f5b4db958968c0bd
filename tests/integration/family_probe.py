"""`python -m tests.integration.family_probe FOLDER...`: what vLLM answers with an adapter.

In: folders, each with `base/` and `release/` (a PEFT directory). Out: one line of JSON for each:
the greedy tokens and their log-probabilities. A process of its own: vLLM changes transformers where
it runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from edge_node.serving import language_model
from protos.base import read_layout

PROMPT = list(range(20, 44))
TOKENS = 6


def answer(base: Path, release: Path) -> dict[str, Any]:
    """`ids` and `log_probs` of the answer to PROMPT; the engine as a node starts it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    overrides = (
        {"architectures": [language_model.architecture(base)]}
        if read_layout(base).wrapper_prefix
        else {}
    )
    llm = LLM(
        model=str(base), dtype="float32", load_format="safetensors", config_format="hf",
        tokenizer_mode="hf", hf_overrides=overrides, enforce_eager=True, enable_lora=True,
        max_loras=1, max_lora_rank=8, max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True)
    request = LoRARequest("release", 1, str(release))
    (output,) = llm.generate(
        {"prompt_token_ids": PROMPT}, sampling, lora_request=request, use_tqdm=False
    )
    ids, found = output.outputs[0].token_ids, output.outputs[0].logprobs or []
    del llm
    cleanup_dist_env_and_memory()
    return {
        "ids": list(ids),
        "log_probs": [given[token].logprob for token, given in zip(ids, found, strict=True)],
    }


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # vLLM logs to standard output
        language_model.register()
        for folder in map(Path, sys.argv[1:]):
            try:
                found = answer(folder / "base", folder / "release")
            except Exception as error:  # the other families go on
                found = {"error": repr(error)[-600:]}
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
