from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_node.capture import (
    Finished,
    Generation,
    Made,
    Recorder,
    RecorderCounts,
    Served,
    to_interaction,
)
from edge_node.capture.recorder import CALM_S
from edge_node.errors import StorageError
from edge_node.experience import Choice, ExperienceStore, Interaction
from edge_node.problems import Problems

CHAT = {"model": "lorikeet@v1", "messages": [{"role": "user", "content": "hi"}]}


def make_served(prompts: int = 1, *, text_only: bool = True) -> Served:
    return Served([Generation(text_only, [5, 6 + number], [7, 2]) for number in range(prompts)])


def make_chat(
    answer_id: str = "chatcmpl-1",
    request: dict[str, Any] | None = None,
    served: Served | None = None,
    **choice: Any,
) -> Finished:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "finish_reason": "stop",
    } | choice
    body = json.dumps({"id": answer_id, "model": "lorikeet@v1", "choices": [choice]}).encode()
    pieces = [body[:10], body[10:]]
    return Finished(
        "/v1/chat/completions", request or CHAT, pieces, False, "now", served or make_served()
    )


def make_stream(*chunks: dict[str, Any] | str) -> Finished:
    lines = [
        chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n" for chunk in chunks
    ]
    raw = "".join([*lines, "data: [DONE]\n\n"]).encode()
    pieces = [raw[start : start + 7] for start in range(0, len(raw), 7)]
    return Finished("/v1/chat/completions", CHAT, pieces, True, "now", make_served())


def chunk(text: str | None = None, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {
        "id": "chatcmpl-2",
        "model": "lorikeet@v1",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }


def test_a_body_becomes_an_interaction() -> None:
    assert to_interaction(make_chat()) == Interaction(
        "chatcmpl-1", "now", "lorikeet@v1", CHAT["messages"], "hello", "stop",
        "/v1/chat/completions", prompt_ids=(5, 6), answer_ids=(7, 2),
    )  # fmt: skip


def test_a_stream_becomes_the_same_interaction_however_it_was_cut() -> None:
    usage = {"id": "chatcmpl-2", "model": "lorikeet@v1", "choices": [], "usage": {}}
    finished = make_stream(
        chunk(""),
        chunk("hel"),
        ": keep-alive\n\n",
        chunk("other", index=1),
        chunk("lo\n\nü"),
        chunk(finish="length"),
        usage,
    )
    interaction = to_interaction(finished)
    assert interaction is not None
    assert (interaction.id, interaction.answer, interaction.finish_reason) == (
        "chatcmpl-2",
        "hello\n\nü",
        "length",
    )
    assert (interaction.prompt_ids, interaction.answer_ids) == ((5, 6), (7, 2))


@pytest.mark.parametrize("prompt", ["1 2", ["1 2"], [1, 2], [[1, 2]]], ids=str)
def test_a_prompt_is_kept_as_a_message(prompt: Any) -> None:
    finished = make_chat(request={"prompt": prompt, "echo": False}, message=None, text=" 3")
    interaction = to_interaction(finished)
    assert interaction is not None
    assert interaction.messages == [{"role": "prompt", "content": prompt}]
    assert (interaction.answer, interaction.prompt_ids, interaction.unusable) == (" 3", (5, 6), "")


@pytest.mark.parametrize(
    ("request_", "served", "reason"),
    [
        (
            {"prompt": ["a", "b"]},
            make_served(2),
            "the answer came from several prompts or from beam search",
        ),
        (
            {**CHAT, "use_beam_search": True},
            make_served(),
            "the answer came from several prompts or from beam search",
        ),
        (CHAT, make_served(text_only=False), "the prompt holds more than text"),
    ],
    ids=["several prompts", "beam search", "images"],
)
def test_an_interaction_that_nothing_can_be_learnt_from_says_why(
    request_: dict[str, Any], served: Served, reason: str
) -> None:
    interaction = to_interaction(make_chat(request=request_, served=served))
    assert interaction is not None
    assert (interaction.prompt_ids, interaction.answer_ids, interaction.unusable) == (
        (),
        (),
        reason,
    )


def test_all_choices_of_a_request_are_kept_by_index() -> None:
    made = {1: Made([8, 2], [-0.5, -0.25]), 0: Made([7, 2], [-1.0, -2.0])}
    served = Served([Generation(True, [5, 6], [7, 2], made)])
    interaction = to_interaction(make_chat(served=served))
    assert interaction is not None
    assert interaction.answer_ids == (7, 2)
    assert interaction.choices == (Choice((7, 2), (-1.0, -2.0)), Choice((8, 2), (-0.5, -0.25)))
    made[2] = made.pop(1)
    lost = to_interaction(make_chat(served=served))
    assert lost is not None
    assert lost.choices == (), "a score must mean the answer that was read"


def test_a_token_that_nobody_was_shown_is_no_part_of_the_answer() -> None:
    request = {"prompt": "1 2", "echo": True, "max_tokens": 0}
    interaction = to_interaction(make_chat(request=request, message=None, text="1 2"))
    assert interaction is not None
    assert (interaction.answer, interaction.prompt_ids, interaction.answer_ids) == ("", (5, 6), ())


def test_an_echoed_prompt_is_no_part_of_the_answer() -> None:
    interaction = to_interaction(
        make_chat(request={"prompt": "1 2", "echo": True}, message=None, text="1 2 3")
    )
    assert interaction is not None
    assert interaction.answer == " 3"


@pytest.mark.parametrize(
    "finished",
    [
        make_stream(chunk("a"), {"error": {"message": "engine died"}}),
        make_stream(chunk("a")),
    ],
    ids=["error in the stream", "no end"],
)
def test_what_did_not_come_to_its_end_is_skipped(finished: Finished) -> None:
    assert to_interaction(finished) is None


class GatedStore(ExperienceStore):
    """A store whose disk waits for a test, or fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()
        self.groups: list[int] = []
        self.error: Exception | None = None

    def add_interactions(self, rows: Sequence[Interaction]) -> None:
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.groups.append(len(rows))
        super().add_interactions(rows)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatedStore]:
    store = GatedStore(tmp_path / "experience.db")
    yield store
    store.gate.set()


def make_recorder(
    store: ExperienceStore,
    *,
    queue_size: int = 100,
    durable_timeout_s: float = 10,
    clock: Callable[[], float] = time.monotonic,
) -> Recorder:
    return Recorder(
        store,
        queue_size=queue_size,
        durable_timeout_s=durable_timeout_s,
        problems=Problems(store._path.parent),
        clock=clock,
    )


async def test_an_answer_is_on_disk_when_keep_returns(store: GatedStore) -> None:
    recorder = make_recorder(store)
    assert await recorder.keep(make_chat())
    assert store.interaction("chatcmpl-1") is not None
    recorder.close()


async def test_answers_that_finish_together_share_a_transaction(store: GatedStore) -> None:
    recorder = make_recorder(store)
    store.gate.clear()
    kept = [
        asyncio.create_task(recorder.keep(make_chat(f"chatcmpl-{number}"))) for number in range(20)
    ]
    await asyncio.sleep(0)
    store.gate.set()
    assert all(await asyncio.gather(*kept))
    assert sum(store.groups) == 20
    assert len(store.groups) <= 3
    recorder.close()
    assert recorder.counts() == RecorderCounts(20, 0, 0)


async def test_a_slow_disk_costs_the_interaction_not_the_answer(store: GatedStore) -> None:
    recorder = make_recorder(store, durable_timeout_s=0.01)
    store.gate.clear()
    assert not await recorder.keep(make_chat())
    assert recorder.counts() == RecorderCounts(0, 1, 0)
    store.gate.set()
    recorder.close()
    assert recorder.counts() == RecorderCounts(0, 1, 0), "an answer is counted once"


async def test_a_full_queue_and_a_broken_disk_are_counted(store: GatedStore) -> None:
    recorder = make_recorder(store, queue_size=1)
    store.gate.clear()
    first = asyncio.create_task(recorder.keep(make_chat("chatcmpl-1")))
    await asyncio.sleep(0)
    while not recorder._queue.empty():  # until the writer has taken it
        await asyncio.sleep(0)
    second = asyncio.create_task(recorder.keep(make_chat("chatcmpl-2")))
    await asyncio.sleep(0)
    assert not await recorder.keep(make_chat("chatcmpl-3")), "the queue is full"
    store.error = StorageError("disk full")
    store.gate.set()
    assert not await first
    assert not await second
    store.error = None
    assert await recorder.keep(make_chat("chatcmpl-4")), "capture goes on after a failure"
    recorder.close()
    assert recorder.counts() == RecorderCounts(1, 3, 0)


async def test_an_unreadable_answer_is_lost_and_harms_no_other(store: GatedStore) -> None:
    recorder = make_recorder(store)
    broken = Finished("/v1/chat/completions", CHAT, [b"{"], False, "now", make_served())
    kept = await asyncio.gather(
        recorder.keep(broken), recorder.keep(make_chat()), recorder.keep(make_stream(chunk("a")))
    )
    assert kept == [False, True, False]
    recorder.close()
    assert recorder.counts() == RecorderCounts(1, 1, 1)


async def test_a_client_that_goes_away_loses_nothing(store: GatedStore) -> None:
    recorder = make_recorder(store)
    store.gate.clear()
    waiting = asyncio.create_task(recorder.keep(make_chat()))
    await asyncio.sleep(0)
    waiting.cancel()
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    recorder.close()
    assert store.interaction("chatcmpl-1") is not None


async def until_said(problems: Problems, text: str) -> None:
    async with asyncio.timeout(5):
        while not any(text in problem.text for problem in problems.current()):
            await asyncio.sleep(0.01)


async def test_a_disk_that_hangs_does_not_hold_up_the_event_loop(
    store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(Problems, "report", lambda *_: hangs.wait(10))
    recorder = make_recorder(store, durable_timeout_s=0.01)
    store.gate.clear()
    async with asyncio.timeout(5):
        assert not await recorder.keep(make_chat("chatcmpl-1"))
    hangs.set()
    store.gate.set()
    recorder.close()


async def test_lost_answers_are_a_problem_until_one_is_kept_and_none_was_lost_for_a_while(
    store: GatedStore, tmp_path: Path
) -> None:
    now = [0.0]
    problems = Problems(tmp_path)
    problems.report("capture", "Left by a vLLM that was killed.", "")
    recorder = make_recorder(store, clock=lambda: now[0])
    assert await recorder.keep(make_chat("chatcmpl-1"))
    assert problems.current() == [], (
        "a former process's trouble is over with the first answer that is kept"
    )
    store.error = StorageError("disk full")
    assert not await recorder.keep(make_chat("chatcmpl-2"))
    await until_said(problems, "disk full")
    [problem] = problems.current()
    assert problem.room == "capture"
    assert "EDGE_DATA_DIR" in problem.next_step
    store.error = None
    now[0] = 5
    assert await recorder.keep(make_chat("chatcmpl-3"))
    assert problems.current() == [problem], (
        "one that was kept says little right after one that was lost"
    )
    now[0] = 5 + CALM_S
    assert await recorder.keep(make_chat("chatcmpl-4"))
    assert problems.current() == []
    recorder.close()


async def test_every_way_to_lose_an_answer_is_a_problem(store: GatedStore, tmp_path: Path) -> None:
    problems = Problems(tmp_path)
    recorder = make_recorder(store, queue_size=1, durable_timeout_s=0.01)
    store.gate.clear()
    assert not await recorder.keep(make_chat("chatcmpl-1"))
    await until_said(problems, "disk did not keep up")
    await asyncio.sleep(0)
    second = asyncio.create_task(recorder.keep(make_chat("chatcmpl-2")))
    await asyncio.sleep(0)
    assert not await recorder.keep(make_chat("chatcmpl-3"))
    await until_said(problems, "queue is full")
    store.gate.set()
    await second
    recorder.close()
    recorder = make_recorder(store)
    await recorder.keep(Finished("/v1/chat/completions", CHAT, [b"{"], False, "now", make_served()))
    await until_said(problems, "not readable")
    assert [problem.room for problem in problems.current()] == ["capture"]
    recorder.close()


async def test_without_further_answers_the_problem_ends_too(
    store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.capture.recorder.CALM_S", 0.05)
    recorder = make_recorder(store)
    store.error = StorageError("disk full")
    assert not await recorder.keep(make_chat("chatcmpl-1"))
    await until_said(Problems(tmp_path), "disk full")
    store.error = None
    assert await recorder.keep(make_chat("chatcmpl-2"))
    async with asyncio.timeout(5):
        while Problems(tmp_path).current():
            await asyncio.sleep(0.01)
    recorder.close()


async def test_an_error_that_quotes_an_answer_is_told_by_its_kind(
    store: GatedStore, tmp_path: Path
) -> None:
    recorder = make_recorder(store)
    store.error = ValueError("cannot store 'my secret'")
    assert not await recorder.keep(make_chat())
    await until_said(Problems(tmp_path), "ValueError")
    assert "secret" not in Problems(tmp_path).current()[0].text
    recorder.close()
