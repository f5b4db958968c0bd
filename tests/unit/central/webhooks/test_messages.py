"""What a webhook is told, how it is signed, and which addresses and secrets are refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from pydantic import ValidationError

from central.errors import SettingsError
from central.journal import EventKind, NewEvent
from central.operations_settings import WebhookSettings
from central.webhooks.messages import Message, headers, of_event, of_problem, read_secret
from tests.fakes.state_only import StateOnly
from tests.unit.central import builders as make

ALL = frozenset({"release", "rollback", "problem"})


def story() -> StateOnly:
    """A candidate that is accepted and promoted, one that is rejected, a rollback, a quarantine."""
    journal = StateOnly()
    genesis = make.make_release()
    journal.append(make.cohort_created(genesis), make.token_created(), make.node_enrolled())
    first = make.make_update(genesis, sequence=1)
    plan = make.make_plan(genesis, first)
    good = make.make_candidate(plan)
    journal.append(make.admitted(first), make.planned(plan), make.built(good))
    journal.append(make.decided(good, True), make.promoted(good))
    second = make.make_update(good, sequence=2)
    plan = make.make_plan(good, second)
    bad = make.make_candidate(plan)
    journal.append(make.admitted(second), make.planned(plan), make.built(bad))
    journal.append(make.decided(bad, False, "arithmetic fell by 7 points"))
    journal.append(make.rolled_back(genesis, good))
    body = {"reason": "three updates were rejected alone", "by": "gate"}
    journal.append(NewEvent(EventKind.NODE_QUARANTINED, "shared", "a-00000000", body))
    return journal


def told(journal: StateOnly, groups: frozenset[str] = ALL) -> list[dict[str, Any]]:
    made = [of_event(event, journal.state, groups) for event in journal.recorded]
    return [json.loads(message.body) for message in made if message is not None]


def test_releases_rollbacks_and_problems_are_told_and_nothing_else() -> None:
    assert [document["type"] for document in told(story())] == [
        "release.promoted",
        "problem.candidate_rejected",
        "release.rolled_back",
        "problem.node_quarantined",
    ]
    assert [d["type"] for d in told(story(), frozenset({"rollback"}))] == ["release.rolled_back"]


def test_a_document_says_which_release_and_why() -> None:
    promoted, rejected, rolled, quarantined = told(story())
    assert promoted["timestamp"] == make.AT
    assert promoted["data"]["release"].startswith("v1-")
    assert promoted["data"]["channel"] == "stable"
    assert rejected["data"]["text"] == "arithmetic fell by 7 points"
    assert rolled["data"]["release"].startswith("v0-")
    assert quarantined["data"]["subject"] == "a-00000000"
    assert "signature" not in json.dumps(told(story()))


def test_the_same_event_is_the_same_message() -> None:
    one, other = story(), story()
    for event in one.recorded:
        before = of_event(event, one.state, ALL)
        assert before == of_event(event, other.state, ALL)
    began = of_problem("uploads", make.AT, True, {"text": "full"})
    assert began == of_problem("uploads", make.AT, True, {"text": "full"})
    assert began.message_id != of_problem("uploads", make.AT, False, {}).message_id


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of its reference libraries."""
    secret = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "it")
    message = Message("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}')
    assert headers(message, secret, 1614265330)["webhook-signature"] == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2-hunter2-hunter2-hunter2",
        "whsec_!!!",
        "whsec_" + base64.b64encode(b"short").decode(),
    ],
)
def test_a_secret_that_is_none_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(SettingsError, match="holds no usable secret") as refused:
        read_secret(text, "the file")
    assert not text or text not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org/x", "expected https://host/path"),
        ("example.org/hook", "no scheme"),
        ("https://", "expected https://host/path"),
        ("https://[::1", "is no address"),
        ("https://host:port/x", "is no address"),
        ("https://me:s3cret@example.org/x", "a user name or a password"),
        ("https://example.org/x#s3cret", "a fragment"),
        ("http://example.org/s3cret", "PLAIN_HTTP"),
        ("https://example.org/a b", "percent-encoded"),
        ("https://example.org/\r\nx-evil: 1", "percent-encoded"),
    ],
)
def test_a_bad_address_is_refused_and_not_quoted(url: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        WebhookSettings(urls=["https://good.example.org/", url])
    [error] = refused.value.errors()
    assert error["msg"].startswith("Value error, address 2 of CENTRAL_WEBHOOKS__URLS")
    assert said in error["msg"]
    assert "s3cret" not in error["msg"]


def test_good_addresses_are_taken() -> None:
    WebhookSettings(urls=["https://a.example/x?y=1", "http://127.0.0.1:8/", "http://[::1]:8/"])
    WebhookSettings(urls=["http://alerts.svc:8/x"], plain_http=True)
    with pytest.raises(ValidationError, match="twice"):
        WebhookSettings(urls=["https://a.example/", "https://a.example/"])
