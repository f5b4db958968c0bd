"""A tiny random Llama that can spell: byte-level tokens and a chat template with tools.

In: nothing. Out: a Hugging Face model directory. Its tokens can spell JSON, so that vLLM can hold
it to a schema or a tool call; what it says otherwise is noise.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.fakes.chat_templates import make_base

STYLE = "qwen3"


def talking_model() -> Path:
    """The directory, built once per machine in the temporary directory."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    target = Path(tempfile.gettempdir()) / "lorikeet-talking-model-v1"
    if not target.is_dir():
        building = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
        building.chmod(0o755)
        make_base(building, STYLE)
        torch.manual_seed(0)
        model = LlamaForCausalLM(AutoConfig.from_pretrained(building)).to(torch.float32)
        model.save_pretrained(building, safe_serialization=True)
        try:
            building.rename(target)
        except OSError:  # another run of tests was faster; its model is the same
            shutil.rmtree(building)
    return target
