"""What a virtual node reports of texts, without vLLM, is what a report may hold."""

from __future__ import annotations

import pytest

from central.journal import EvaluationRecord
from central.releases.reports import check_results
from edge_node.federation.answering import Comparison, compare
from edge_node.settings import EnvironmentSpec
from protos.lora import LoraTensors
from protos.releases.v1 import releases_pb2
from tests.fakes.tiny_model import tiny_adapter, tiny_model

SPECS = [
    EnvironmentSpec(name="text", factory="tests.fakes.text_environment:Texts", anchor=True),
    EnvironmentSpec(name="words", factory="tests.fakes.word_environment:NextWord"),
]


def test_texts_and_tasks_in_one_offer() -> None:
    releases = {"old": LoraTensors(), "new": tiny_adapter(1)}
    offered = {"text": Comparison("old", 20, 10), "words": Comparison("old", 0, 3)}
    text, words = compare(tiny_model(), releases, "new", SPECS, offered, seed=3)
    assert "likelihood" not in words
    found = text["likelihood"]
    assert (text["anchor"], found["documents"], found["tokens"]) == (True, 4, 4 * 11)
    assert found["candidate_mean"] != pytest.approx(found["reference_mean"], abs=0.1)
    offer = EvaluationRecord("o", "shared", "c", "r", 10, "2026-11-22T12:00:00Z", ("a-1",))
    check_results([releases_pb2.EnvironmentResult(**text)], offer)


def test_beyond_the_last_document_there_is_no_likelihood() -> None:
    releases = {"old": LoraTensors(), "new": LoraTensors()}
    (text,) = compare(
        tiny_model(), releases, "new", SPECS[:1], {"text": Comparison("old", 24, 10)}, seed=3
    )
    assert "likelihood" not in text
