"""The tokenizer of the tiny base model.

In: training texts. Out: a byte-level BPE of 512 tokens (`train_tokenizer`), and a Hugging Face
tokenizer directory with a chat template (`save_tokenizer`). Letters group, every digit and every
space is a token of its own: a word has the same tokens everywhere, so copying is uniform. Decoding
what was encoded gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 512
PAD, BEGIN, END = "<pad>", "<s>", "</s>"
ROLES = ("user", "assistant", "system", "tool")
SPECIAL_TOKENS = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d| |[^A-Za-z\d ]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def prompt_text(content: str) -> str:
    """What the chat template makes of one user message."""
    return f"<|user|>{content}{END}<|assistant|>"


def save_tokenizer(
    tokenizer: Tokenizer,
    directory: Path,
    *,
    template: str = CHAT_TEMPLATE,
    positions: int = 256,
) -> None:
    """Write the files that transformers and vLLM load; the chat template is part of them."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
