"""Telling one address: in order, until it takes it, over restarts; and problems that stand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from central.errors import StorageError
from central.fleet.presence import Presence
from central.journal import EventKind, Journal, NewEvent
from central.webhooks import teller as tellers
from central.webhooks.messages import Message
from central.webhooks.place import PlaceFile
from central.webhooks.standing import Standing
from central.webhooks.teller import Source, Teller
from protos.fleet.v1 import fleet_pb2
from tests.fakes.state_only import StateOnly
from tests.unit.central import builders as make

URL = "https://example.org/s3cret"
ALL = frozenset({"release", "rollback", "problem"})


class Receiver:
    """An address: takes messages, or says why not."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.got: list[Message] = []
        self.asked = 0
        self.changed = threading.Condition()

    def __call__(self, message: Message) -> str | None:
        with self.changed:
            self.asked += 1
            if self.why is None:
                self.got.append(message)
            self.changed.notify_all()
            return self.why

    @property
    def types(self) -> list[str]:
        return [json.loads(message.body)["type"] for message in self.got]


@pytest.fixture
def journal() -> StateOnly:
    journal = StateOnly()
    journal.append(make.cohort_created(make.make_release()), make.token_created())
    journal.append(*(make.node_enrolled(f"{name}-00000000") for name in "abc"))
    return journal


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def start(tmp_path: Path, journal: StateOnly, receiver: Receiver) -> Callable[..., Teller]:
    def start(
        presence: Presence | None = None,
        failure: Callable[[str], str] = lambda cohort: "",
        shortage: Callable[[], str] = lambda: "",
    ) -> Teller:
        source = Source(cast(Journal, journal), presence or Presence(), failure, shortage)
        return Teller(URL, PlaceFile(tmp_path, URL), source, ALL, receiver)

    return start


def quarantine(journal: StateOnly, name: str) -> None:
    body = {"reason": "tests", "by": "gate"}
    journal.append(NewEvent(EventKind.NODE_QUARANTINED, "shared", f"{name}-00000000", body))


def test_a_new_address_hears_what_happens_from_now_on(
    journal: StateOnly, receiver: Receiver, start: Callable[..., Teller]
) -> None:
    quarantine(journal, "a")
    teller = start()
    assert teller.step() is None
    assert receiver.got == []
    quarantine(journal, "b")
    assert teller.step() is None
    assert receiver.types == ["problem.node_quarantined"]
    assert teller.step() is None
    assert len(receiver.got) == 1


def test_what_was_not_taken_is_told_after_a_restart_in_order_and_once(
    journal: StateOnly, receiver: Receiver, start: Callable[..., Teller]
) -> None:
    teller = start()
    receiver.why = "it answered with HTTP 503"
    for name in "abc":
        quarantine(journal, name)
    assert teller.step() == receiver.why
    assert (teller.waiting, receiver.got) == (3, [])
    receiver.why = None
    again = start()
    assert again.step() is None
    subjects = [json.loads(message.body)["data"]["subject"][0] for message in receiver.got]
    assert subjects == ["a", "b", "c"]
    assert start().step() is None
    assert len(receiver.got) == 3


def test_a_kill_between_the_answer_and_the_note_tells_again_with_the_same_id(
    journal: StateOnly,
    receiver: Receiver,
    start: Callable[..., Teller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teller = start()
    quarantine(journal, "a")

    def killed(*_: object) -> None:
        raise StorageError("killed")

    with monkeypatch.context() as broken:
        broken.setattr(PlaceFile, "write", killed)
        with pytest.raises(StorageError):
            teller.step()
    assert start().step() is None
    one, other = receiver.got
    assert one == other


def test_another_journal_is_told_from_its_end(
    journal: StateOnly, receiver: Receiver, start: Callable[..., Teller]
) -> None:
    start()
    quarantine(journal, "a")
    journal.recorded[4] = journal.recorded[0]  # the event at the cursor has another hash
    assert start().step() is None
    assert receiver.got == []
    quarantine(journal, "b")
    assert start().step() is None
    assert receiver.types == ["problem.node_quarantined"]


def test_a_damaged_place_is_said(tmp_path: Path, start: Callable[..., Teller]) -> None:
    start()
    [file] = (tmp_path / "webhooks").iterdir()
    assert "s3cret" not in file.name + file.read_text()
    file.write_text("{")
    with pytest.raises(StorageError, match="how far a webhook was told"):
        start()


def look_and_tell(teller: Teller) -> None:
    teller.look()
    teller.step()


def test_standing_problems_begin_and_end_once_also_over_a_restart(
    receiver: Receiver, start: Callable[..., Teller]
) -> None:
    wrong = ["the disk is full"]

    def failure(cohort: str) -> str:
        return wrong[0]

    teller = start(failure=failure)
    for _ in range(5):
        look_and_tell(teller)
    assert receiver.types == ["problem.began"]
    teller = start(failure=failure)
    for _ in range(5):
        look_and_tell(teller)
    assert receiver.types == ["problem.began"], "it is known"
    wrong[0] = ""
    for _ in range(5):
        look_and_tell(teller)
    assert receiver.types == ["problem.began", "problem.ended"]


def test_a_problem_that_was_not_taken_waits_on_disk(
    receiver: Receiver, start: Callable[..., Teller]
) -> None:
    receiver.why = "connection refused"
    teller = start(shortage=lambda: "no room")
    for _ in range(3):
        look_and_tell(teller)
    receiver.why = None
    teller = start()
    assert teller.step() is None
    assert receiver.types == ["problem.began"]


def test_a_node_in_trouble_is_one_problem_and_is_not_over_while_it_is_away(
    receiver: Receiver, start: Callable[..., Teller]
) -> None:
    presence = Presence()
    presence.opened("a-00000000")
    rooms = [fleet_pb2.Problem(room=f"room {n}", text="It fails.") for n in range(20)]
    presence.report("a-00000000", fleet_pb2.NodeStatus(problems=rooms))
    teller = start(presence=presence)
    for _ in range(4):
        look_and_tell(teller)
    [began] = receiver.got
    assert json.loads(began.body)["data"]["node_id"] == "a-00000000"
    presence.closed("a-00000000")
    for _ in range(4):
        look_and_tell(teller)
    assert len(receiver.got) == 1
    presence.opened("a-00000000")
    presence.report("a-00000000", fleet_pb2.NodeStatus())
    for _ in range(4):
        look_and_tell(teller)
    assert receiver.types == ["problem.began", "problem.ended"]


def test_what_flickers_is_not_told() -> None:
    standing = Standing({})
    for look in range(10):
        now = {"uploads": {"text": "full"}} if look % 2 else {}
        assert standing.look(now, lambda key: False) == []


def test_problems_that_wait_are_bounded(
    receiver: Receiver, start: Callable[..., Teller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tellers, "MOST_PROBLEMS", 3)
    receiver.why = "away"
    wrong = ["", ""]
    teller = start(failure=lambda cohort: wrong[0])
    for turn in range(12):
        wrong[0] = "it fails" if turn % 4 < 2 else ""
        look_and_tell(teller)
    assert teller.waiting == 3


def test_the_thread_tries_again_and_ends(
    journal: StateOnly,
    receiver: Receiver,
    start: Callable[..., Teller],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tellers, "FIRST_PAUSE_S", 0.01)
    teller, stop = start(), threading.Event()
    receiver.why = "it answered with HTTP 500"
    thread = threading.Thread(target=teller.run, args=(stop,))
    thread.start()
    with receiver.changed:
        quarantine(journal, "a")
        assert receiver.changed.wait_for(lambda: receiver.asked >= 3, 10)
        receiver.why = None
        assert receiver.changed.wait_for(lambda: receiver.got, 10)
    stop.set()
    teller.wake()
    thread.join(10)
    assert not thread.is_alive()
    assert teller.failed >= 3
    assert "s3cret" not in caplog.text
    assert caplog.records[0].__dict__["host"] == "example.org"


def test_events_do_not_hurry_the_looks(
    journal: StateOnly,
    receiver: Receiver,
    start: Callable[..., Teller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two looks are ten seconds apart, however many events wake the thread."""
    monkeypatch.setattr(tellers, "BATCH_S", 0.0)
    teller, stop = start(shortage=lambda: "no room"), threading.Event()
    thread = threading.Thread(target=teller.run, args=(stop,))
    thread.start()
    for number, name in enumerate("abc", 1):
        with receiver.changed:
            quarantine(journal, name)
            assert receiver.changed.wait_for(lambda most=number: len(receiver.got) >= most, 10)
    stop.set()
    teller.wake()
    thread.join(10)
    assert receiver.types == ["problem.node_quarantined"] * 3
