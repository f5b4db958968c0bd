from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edge_node.capture import Redaction, Span, TokenTexts, load_redactor
from edge_node.capture.redaction import MOST_CHARACTERS
from edge_node.errors import SettingsError, StorageError
from edge_node.experience import Choice, EpisodeFeedback, Feedback, Interaction
from edge_node.experience.usable import NOT_REDACTABLE
from tests.fakes.gateway import Letters

MAIL = "Write to bob@example.org or +49 30 901820, please. "
KEPT = "Write to [EMAIL] or [PHONE], please. "


def make_redaction() -> Redaction:
    return Redaction(load_redactor("default"), Letters())


def make_interaction(prompt: str = "hi", answer: str = "yes", **fields: object) -> Interaction:
    messages = [{"role": "user", "content": prompt}]
    ids = Letters().ids
    made = Interaction(
        "chatcmpl-1", "now", "lorikeet@v1", messages, answer, "stop", "/v1/chat/completions",
        tuple(ids(prompt)), (*ids(answer), 0),
    )  # fmt: skip
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


class FromPlugin:
    """A redactor as an operator writes one."""

    def __init__(self) -> None:
        self.spans = [Span(0, 2, "NAME")]

    def find(self, text: str) -> list[Span]:
        return [span for span in self.spans if text.startswith("hi")]


def test_what_holds_nothing_stays_as_it_was_served() -> None:
    interaction = make_interaction(choices=(Choice((7,), (-0.5,)), Choice((8,), (-0.5,))))
    assert make_redaction().interaction(interaction) == interaction
    assert Redaction(None, Letters()).interaction(make_interaction(MAIL)) == make_interaction(MAIL)


def test_texts_and_token_ids_get_placeholders() -> None:
    kept = make_redaction().interaction(make_interaction(MAIL, "call +49 30 901820"))
    assert kept.messages == [{"role": "user", "content": KEPT}]
    assert kept.answer == "call [PHONE]"
    assert "".join(map(chr, kept.prompt_ids)) == KEPT
    assert "".join(map(chr, kept.answer_ids)) == "call [PHONE]\0"
    assert kept.redacted == ("prompt", "0")
    assert not kept.unusable


def test_what_only_the_tokens_hold_is_found_too() -> None:
    """Tool calls and reasoning are no part of the answer that a client reads."""
    hidden = make_interaction(answer_ids=tuple(map(ord, '<tool_call>{"to": "bob@example.org"}')))
    kept = make_redaction().interaction(hidden)
    assert "".join(map(chr, kept.answer_ids)) == '<tool_call>{"to": "[EMAIL]"}'
    assert kept.redacted == ("0",)


def test_choices_after_another_prompt_or_with_other_tokens_have_no_log_probabilities() -> None:
    mail = tuple(map(ord, "x bob@example.org"))
    choices = (Choice((7,), (-0.5,)), Choice(mail, (-0.5,) * len(mail)))
    kept = make_redaction().interaction(make_interaction(choices=choices, answer_ids=(7,)))
    assert kept.redacted == ("1",)
    assert [choice.logprobs for choice in kept.choices] == [(), ()]
    assert "".join(map(chr, kept.choices[1].answer_ids)) == "x [EMAIL]"


def test_tool_calls_numbers_and_names_of_fields_are_searched() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "bob@example.org"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": MAIL}], "bob@example.org": True},
        {"role": "user", "content": "x", "card": 4111111111111111, "count": 3},
    ]
    kept = make_redaction().interaction(make_interaction(messages=messages)).messages
    assert kept[0]["tool_calls"][0]["function"]["arguments"] == '{"a": "[EMAIL]"}'
    assert kept[1] == {"role": "tool", "content": [{"type": "text", "text": KEPT}], "[EMAIL]": True}
    assert kept[2] == {"role": "user", "content": "x", "card": "[CARD]", "count": 3}


def test_what_is_no_text_is_not_kept() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "see"}, image]
    kept = make_redaction().interaction(
        make_interaction(messages=[{"role": "user", "content": content}])
    )
    assert kept.messages[0]["content"] == [{"type": "text", "text": "see"}, {"type": "image_url"}]


def test_texts_that_are_too_long_to_search_are_not_kept() -> None:
    long = make_interaction(messages=[{"role": "user", "content": "a" * (MOST_CHARACTERS + 1)}])
    assert make_redaction().interaction(long).messages[0]["content"] == "[LONG]"


class Deaf(Letters):
    """Cannot tell which tokens make which characters."""

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        raise ValueError("no pieces")


class Stubborn(Letters):
    """Makes tokens of a placeholder that read as something to redact again."""

    def ids(self, text: str) -> list[int]:
        return super().ids("bob@example.org")


@pytest.mark.parametrize("texts", [Deaf(), Stubborn()])
def test_tokens_that_cannot_be_redacted_are_not_kept(texts: Letters) -> None:
    redaction = Redaction(load_redactor("default"), texts)
    kept = redaction.interaction(make_interaction(MAIL, choices=(Choice((1,)), Choice((2,)))))
    assert (kept.prompt_ids, kept.answer_ids, kept.choices) == ((), (), ())
    assert (kept.unusable, kept.messages[0]["content"]) == (NOT_REDACTABLE, KEPT)
    assert redaction.interaction(make_interaction()).prompt_ids


def test_feedback_is_redacted() -> None:
    said = Feedback("chatcmpl-1", correction=MAIL, comment=MAIL)
    kept = make_redaction().feedback(said)
    assert (kept.correction, kept.comment, kept.redacted) == (KEPT, KEPT, True)
    remark = make_redaction().feedback(Feedback("chatcmpl-1", correction="ok", comment=MAIL))
    assert (remark.correction, remark.comment, remark.redacted) == ("ok", KEPT, False)


def test_a_redactor_of_ones_own() -> None:
    redactor = load_redactor(f"{__name__}:FromPlugin")
    kept = Redaction(redactor, Letters()).interaction(make_interaction("hi there"))
    assert kept.messages[0]["content"] == "[NAME] there"
    assert "".join(map(chr, kept.prompt_ids)) == "[NAME] there"


@pytest.mark.parametrize("span", [Span(0, 99, "X"), Span(1, 1, "X"), Span(0, 1, "x y")])
def test_impossible_spans_are_an_error_so_that_nothing_is_written(span: Span) -> None:
    redactor = FromPlugin()
    redactor.spans = [span]
    with pytest.raises(TypeError, match="expected a span inside the text"):
        Redaction(redactor, Letters()).interaction(make_interaction("hi"))


@pytest.mark.parametrize("name", ["no_such_module:X", f"{__name__}:absent", "json:JSONDecoder"])
def test_a_redactor_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match="EDGE_CAPTURE__REDACTION is '" + name):
        load_redactor(name)


TEXTS = (MAIL, "Grüße, 日本 🙂 an bob@example.org🙂!", "bob@example.org", "x\n\nbob@example.org\n")


def make_tokenizer(*, byte_level: bool) -> Tokenizer:
    """As of Llama 3 or Qwen (byte_level), or of Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token="<unk>"))
    special = ["<unk>", "<s>"]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([MAIL * 3, KEPT, "Write to us, please"], trainer)
    return tokenizer


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizers_lose_the_secret_and_nothing_else(text: str, byte_level: bool) -> None:
    class Backend:
        backend_tokenizer = make_tokenizer(byte_level=byte_level)

    texts = TokenTexts(Backend())
    redaction = Redaction(load_redactor("default"), texts)
    served = [1, *texts.ids(text), 1]  # between special tokens
    kept = redaction.ids(served)
    expected = redaction.text(texts.text(served))
    assert texts.text(kept).replace(" ", "") == expected.replace(" ", "")
    assert "@" not in texts.text(kept)
    assert (kept[0], kept[-1]) == (1, 1)
    alike = 0
    while kept[alike] == served[alike]:
        alike += 1
    assert alike > 1 or text.startswith("bob") or not byte_level


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["1", "a@b.de ", "DE12 "])
async def test_a_body_of_64_mib_takes_seconds_and_does_not_hold_up_the_loop(unit: str) -> None:
    part = (unit * ((4 << 20) // len(unit) + 1))[: MOST_CHARACTERS - 8]
    messages = [{"role": "user", "content": part}] * 16
    interaction = make_interaction(messages=messages)
    redacting = asyncio.create_task(asyncio.to_thread(make_redaction().interaction, interaction))
    longest, begins = 0.0, time.process_time()
    while not redacting.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
    kept = (await redacting).messages
    assert [message["content"] for message in kept[1:]] == ["[LONG]"] * 15
    assert time.process_time() - begins < 20
    assert longest < 1  # other processes share the cores


def test_a_type_in_the_arguments_of_corrected_tool_calls_hides_nothing() -> None:
    items = [{"type": "shirt", "size": 4}, {"type": "image_url", "to": "me"}]
    calls = [{"function": {"name": "order", "arguments": {"items": items}}}]
    said = Feedback("chatcmpl-1", None, json.dumps(calls), form="tool_calls")
    kept = make_redaction().feedback(said)
    assert (kept.correction, kept.redacted) == (said.correction, False)
    items[0]["to"] = "bob@example.org"
    kept = make_redaction().feedback(dataclasses.replace(said, correction=json.dumps(calls)))
    assert json.loads(kept.correction or "")[0]["function"]["arguments"]["items"][0] == {
        "type": "shirt", "size": 4, "to": "[EMAIL]",
    }  # fmt: skip
    assert kept.redacted


class Raises:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def find(self, text: str) -> list[Span]:
        raise self._error


@pytest.mark.parametrize("error", [ValueError(MAIL), RuntimeError(MAIL)])
def test_a_redactor_that_raises_on_feedback_is_no_fault_of_the_client_and_quotes_nobody(
    error: Exception,
) -> None:
    redaction = Redaction(Raises(error), Letters())
    for said in (Feedback("chatcmpl-1", 1.0, comment=MAIL), EpisodeFeedback("e", 1.0, MAIL)):
        with pytest.raises(StorageError, match=f"raised {type(error).__name__}") as raised:
            redaction.said(said)
        assert "bob" not in str(raised.value)
        assert raised.value.__suppress_context__
