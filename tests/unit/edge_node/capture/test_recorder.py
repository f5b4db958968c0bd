from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edge_node.capture import (
    Finished,
    Recorder,
    RecorderCounts,
    to_interaction,
)
from edge_node.capture.recorder import CALM_S
from edge_node.errors import StorageError
from edge_node.experience import ExperienceStore, Interaction
from edge_node.problems import Problems
from tests.unit.edge_node.capture.test_capture import (
    CHAT,
    chunk,
    make_chat,
    make_served,
    make_stream,
)


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
    parse: Callable[[Finished], Interaction | None] = to_interaction,
) -> Recorder:
    return Recorder(
        store,
        queue_size=queue_size,
        durable_timeout_s=durable_timeout_s,
        problems=Problems(store._path.parent),
        clock=clock,
        parse=parse,
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


async def test_once_one_waited_in_vain_no_other_answer_waits_until_the_disk_answers(
    store: GatedStore,
) -> None:
    recorder = make_recorder(store, durable_timeout_s=0.5)
    store.gate.clear()
    assert not await recorder.keep(make_chat("chatcmpl-1"))
    begins = time.monotonic()
    for number in range(20):
        assert not await recorder.keep(make_chat(f"chatcmpl-2{number}"))
    assert time.monotonic() - begins < 0.5, "they did not wait"
    store.gate.set()
    async with asyncio.timeout(10):
        while not await recorder.keep(make_chat("chatcmpl-3")):
            await asyncio.sleep(0.01)
    store.gate.clear()
    threading.Timer(0.05, store.gate.set).start()
    assert await recorder.keep(make_chat("chatcmpl-4")), "answers wait for the disk again"
    recorder.close()
    counts = recorder.counts()
    assert (counts.captured, counts.lost >= 21) == (2, True)


async def test_an_answer_that_nobody_waits_for_is_kept(store: GatedStore) -> None:
    recorder = make_recorder(store)
    recorder.offer(make_chat())
    recorder.close()
    assert recorder.counts() == RecorderCounts(1, 0, 0)
    assert store.interaction("chatcmpl-1") is not None


async def test_a_redactor_that_fails_costs_the_interaction(store: GatedStore) -> None:
    def failing(finished: Finished) -> Interaction | None:
        raise TypeError("bob@example.org")

    recorder = make_recorder(store, parse=failing)
    assert not await recorder.keep(make_chat())
    recorder.close()
    assert recorder.counts() == RecorderCounts(0, 1, 0)
    assert store.counts().interactions == 0
    (problem,) = Problems(store._path.parent).current()
    assert "TypeError" in problem.text
    assert "bob" not in problem.text


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
