"""Chat templates with the habits of known model families, written for the tests, and a byte-level
tokenizer for them.

In: the name of a style. Out: a directory with tokenizer and config that transformers and vLLM load
(no weights).
"""

from __future__ import annotations

import json
from pathlib import Path

from examples.quickstart.tokenizer import CHAT_TEMPLATE as QUICKSTART

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Trims contents, puts tools into the first user message, writes one tool call as a JSON object,
# ends with <|eot_id|>.
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if tools and loop.first %}{{ 'Functions: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\n\n' }}{% endif %}
{{- (message.content | trim) + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# A tools section, tool calls with decoded arguments, tool answers as user turns, thinking that can
# be switched off.
QWEN3 = """\
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.last and message.reasoning_content is string %}
{{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content.split('</think>')[-1].lstrip('\n') }}
{%- for call in message.tool_calls or [] %}
{%- if content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# Reads content as parts, knows no system role, calls the assistant `model`, and refuses two turns
# of one side.
PARTS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ('user', 'assistant') %}{{ raise_exception('role ' + message.role) }}{% endif %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{%- for part in message.content %}{{ part.text | trim }}{% endfor %}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Ends a turn with <|end|>, and a conversation with the tokenizer's eos after it; knows the role
# `developer`.
PHI3 = """\
{%- for message in messages %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{{- '<|' + role + '|>\n' + (message.content or '') + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

STYLES: dict[str, tuple[str, str]] = {
    "quickstart": (QUICKSTART, "</s>"),
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "parts": (PARTS, "<end_of_turn>"),
    "phi3": (PHI3, "<|end|>"),
}
"""Name -> template, and the token that ends an assistant's turn."""
EOS = {"quickstart": "</s>", "phi3": "<|endoftext|>"}
"""The tokenizer's eos; `<|end_of_text|>` for the others."""
SPECIALS = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
    "<|end_of_text|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>",
    "<|assistant|>",
    "<|system|>", "<|tool|>",
]  # fmt: skip
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""One token each, and part of the text."""
POSITIONS = 2048


def make_base(target: Path, style: str) -> Path:
    """A tiny random Llama with a byte tokenizer: all that an API server reads."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    template, end_of_turn = STYLES[style]
    letters = {
        letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos = EOS.get(style, "<|end_of_text|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>",
        additional_special_tokens=SPECIALS, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_tokens(ADDED)
    fast.chat_template = template
    fast.save_pretrained(target)
    stops = sorted(set(fast.convert_tokens_to_ids([end_of_turn, eos])))
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=POSITIONS, bos_token_id=fast.bos_token_id,
        eos_token_id=stops[0], pad_token_id=fast.pad_token_id, architectures=["LlamaForCausalLM"],
        dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return target
