"""`edge-node anchors make`: the base writes its own anchors (importing this module loads torch).

In: the base, questions, a seed. Out: a directory (`anchors.py` says what is in it) with three kinds
of samples: text from nothing at temperature 1, answers to open questions at temperature 1, and
greedy answers that are right. Guarantees: the same base, seed, questions and software give the same
bytes; the directory appears when it is complete.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from edge_node.base_model import read_base
from edge_node.errors import EdgeError, StorageError
from edge_node.learning.anchors import INDEX_FILE, STATES, STATES_FILE, AnchorIndex, Kind, Sample
from edge_node.learning.questions import OpenQuestion, read_open, read_qa
from edge_node.learning.teacher import base_states, expect_base
from edge_node.learning.text_model import load_text_model
from edge_node.rendering import ChatFormat, Renderer, load_renderer, read_stop_ids
from edge_node.settings import EdgeSettings
from lorikeet.durable import TEMPORARY_SUFFIX, publish, write_file
from protos.manifest import sha256_hex

PLAIN_TOKENS = 60
"""Length of a plain sample, with the token that begins it."""
ANSWER_TOKENS: dict[Kind, int] = {"open": 50, "qa": 24}
"""Longest answers; a small base rambles on after a short one."""
BATCH = 64
"""Samples that are written at once."""
END_OF_TEXT = "<|endoftext|>"
"""Begins a text where the tokenizer's BOS begins a turn of a chat (ChatML) or where it has none."""

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows how far something is: number of steps -> function that is told of steps done."""


@dataclass(frozen=True)
class Made:
    """right, asked: questions with known answers. size_bytes: of both files."""

    index: AnchorIndex
    right: int
    asked: int
    size_bytes: int


def make_anchors(
    settings: EdgeSettings,
    out: Path,
    *,
    seed: int,
    plain: int,
    open_file: Path,
    qa_file: Path,
    bar: Bar,
) -> Made:
    """Let the base write samples into the new directory `out`.

    Args:
        plain: number of plain samples.
        open_file, qa_file: JSON lines (`questions/`).

    Raises:
        SettingsError: no base model, or one that makes its logits in an unknown way.
        StorageError: `out` exists, or cannot be written.
        EdgeError: a file of questions, or the chat template, is not usable; or there is no sample.
    """
    if out.exists():
        raise StorageError(f"{out} exists. Anchors are never overwritten: choose another --out.")
    base = read_base(settings)
    open_questions, qa_questions = read_open(open_file), read_qa(qa_file)
    renderer = load_renderer(base.path, ChatFormat.read(settings.data_dir))
    open_prompts, qa_prompts = (
        [_prompt(renderer, question) for question in questions]
        for questions in (open_questions, qa_questions)
    )
    disable_progress_bar()
    writer = _Writer(load_text_model(base.path), renderer, read_stop_ids(base.path))
    with bar(2 * (plain + len(open_prompts) + len(qa_prompts))) as advance:
        samples = writer.plain(plain, seed, advance)
        samples += writer.answers("open", open_prompts, seed, advance)
        answers = writer.answers("qa", qa_prompts, None, advance)
        right = [
            sample
            for sample, question in zip(answers, qa_questions, strict=True)
            if question.is_right(writer.text(sample))
        ]
        advance(len(answers) - len(right))
        samples += right
        if not samples:
            raise EdgeError(
                f"There is no sample: --plain is {plain}, {open_file} has no question, and none of "
                f"the {len(answers)} questions in {qa_file} was answered right. Raise --plain, or "
                "ask other questions."
            )
        states = []
        for sample in samples:
            states.append(base_states(writer.model, sample.ids).to("cpu", torch.bfloat16))
            advance(1)
    expect_base(writer.model, samples[0].ids, states[0], "Its own last hidden states")
    hidden = save({STATES: torch.cat(states)})
    index = AnchorIndex(
        base=base.digest,
        seed=seed,
        dtype=str(writer.model.dtype).removeprefix("torch."),
        samples=samples,
        hidden_sha256=sha256_hex(hidden),
    )
    files = {STATES_FILE: hidden, INDEX_FILE: index.to_bytes()}
    _write(out, files)
    return Made(index, len(right), len(answers), sum(len(data) for data in files.values()))


class _Writer:
    """The base in float32, on a GPU where torch sees one, with its tokenizer."""

    def __init__(self, model: Any, renderer: Renderer, stop_ids: Sequence[int]) -> None:
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.model.generation_config = GenerationConfig()  # not the base's own top_p and the like
        self._tokenizer = renderer.tokenizer
        self._ends = sorted({*stop_ids, renderer.end_of_turn})

    def plain(self, count: int, seed: int, advance: Callable[[int], None]) -> list[Sample]:
        """Texts of PLAIN_TOKENS tokens; one that ends is followed by the next one."""
        if not count:
            return []
        torch.manual_seed(seed)
        prompts = [[start_of_text(self._tokenizer)]] * count
        return [
            Sample(kind="plain", ids=ids, prompt=1)
            for ids in self._continue(prompts, PLAIN_TOKENS - 1, [], True, advance)
        ]

    def answers(
        self, kind: Kind, prompts: list[list[int]], seed: int | None, advance: Callable[[int], None]
    ) -> list[Sample]:
        """Answers to their end, or to the longest of its kind; greedy without a seed."""
        if seed is not None:
            torch.manual_seed(seed)
        made = self._continue(prompts, ANSWER_TOKENS[kind], self._ends, seed is not None, advance)
        return [
            Sample(kind=kind, ids=ids, prompt=len(prompt))
            for prompt, ids in zip(prompts, made, strict=True)
        ]

    def text(self, sample: Sample) -> str:
        """What the base wrote, without special tokens."""
        return str(self._tokenizer.decode(sample.ids[sample.prompt :], skip_special_tokens=True))

    def _continue(
        self,
        prompts: list[list[int]],
        tokens: int,
        ends: list[int],
        sampled: bool,
        advance: Callable[[int], None],
    ) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            **(sampling if sampled else {}),
        )
        made = []
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            width = max(map(len, batch))
            gaps = [width - len(prompt) for prompt in batch]  # on the left
            rows = [[0] * gap + prompt for gap, prompt in zip(gaps, batch, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            with torch.no_grad():
                found = self.model.generate(
                    torch.tensor(rows, device=self.model.device),
                    attention_mask=torch.tensor(mask, device=self.model.device),
                    generation_config=config,
                )[:, width:].tolist()
            made += [
                [*prompt, *_to_end(ids, ends)] for prompt, ids in zip(batch, found, strict=True)
            ]
            advance(len(batch))
        return made


def start_of_text(tokenizer: Any) -> int:
    """The token that begins a text without a prompt: BOS, or else what ends a text.

    The BOS of ChatML begins each turn of a chat; from it a model would write a chat.
    """
    chat: list[dict[str, str]] = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    ]  # fmt: skip
    try:
        turns = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # without a template, or one that refuses this: no chat, no turns
        turns = ""
    if tokenizer.bos_token is not None and turns.count(tokenizer.bos_token) < 2:
        return int(tokenizer.bos_token_id)
    found = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise EdgeError(
            "The base's tokenizer has no token that begins or ends a text, and plain anchors begin "
            "with one. Set bos_token or eos_token in its tokenizer_config.json, or give --plain 0."
        )
    return int(found)


def _prompt(renderer: Renderer, question: OpenQuestion) -> list[int]:
    try:
        return renderer.prompt_ids([{"role": "user", "content": question.question}])
    except EdgeError:
        raise
    except Exception as error:  # the template decides what it takes, and raises what it likes
        raise EdgeError(
            f"The base has no chat template that takes a question: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0][:200]} Serve it with one (--chat-template in "
            "EDGE_SERVING__EXTRA_ARGS), or make plain anchors alone: --open /dev/null --questions "
            "/dev/null."
        ) from error


def _to_end(ids: list[int], ends: list[int]) -> list[int]:
    """To the first of `ends`; what follows it in a batch is padding."""
    at = next((number for number, token in enumerate(ids) if token in ends), len(ids))
    return ids[: at + 1]


def _write(out: Path, files: dict[str, bytes]) -> None:
    temporary = out.with_name(f"{out.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            write_file(temporary / name, data, mode=0o644)
        publish(temporary, out)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error}. Choose a directory on a disk with free space."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
