"""`edge-node experience`: what it shows, writes and deletes, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_node.cli import main
from edge_node.experience import (
    Answer,
    Choice,
    EpisodeFeedback,
    ExperienceStore,
    Feedback,
    Interaction,
    Preference,
    Scores,
    Teller,
)
from tests.unit.edge_node.experience.test_experience_store import make_interaction

PROMPT = [{"role": "user", "content": "question"}]
CALLS = '[{"id": "call-0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]'


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("EDGE_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


def make(number: int, **fields: Any) -> Interaction:
    made = replace(make_interaction(number, answer=f"answer {number}"), prompt_ids=(7,))
    return replace(made, **{"messages": PROMPT} | fields)


@pytest.fixture
def store(data_dir: Path) -> ExperienceStore:
    """One of each kind: corrected, liked, disliked, calls, pair, group, plain text, image."""
    store = ExperienceStore(data_dir / "experience.db")
    two = (Choice((3, 4), (-0.5, -0.5)), Choice((5, 4), (-0.5, -0.5)))
    store.add_interactions(
        [
            make(1, environment="desk", user="alice", episode="e"),
            make(2, environment="desk"),
            make(3, environment="lab", created_at="2020-01-01T00:00:00+00:00"),
            make(4),
            make(5, choices=two, answer="first"),
            make(6, messages=[{"role": "prompt", "content": "text"}]),
            make(7, unusable="the prompt holds more than text"),
        ]
    )
    for said in (
        Feedback("chatcmpl-1", 0.0, "right", "so it is", (9,)),
        Feedback("chatcmpl-2", 1.0, form="thumb"),
        Feedback("chatcmpl-3", 0.0, form="thumb"),
        Feedback("chatcmpl-4", correction=CALLS, correction_ids=(9,), form="tool_calls"),
        Preference(Answer("chatcmpl-1"), Answer("chatcmpl-2")),
        Preference(Answer("chatcmpl-2"), Answer("chatcmpl-1")),
        Scores("chatcmpl-5", (0.25, 1.0)),
        Feedback("chatcmpl-6", 1.0),
        Feedback("chatcmpl-7", 1.0),
    ):
        store.give(said, max_tokens=99)
    return store


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["experience", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize(
    "arguments", [("list",), ("show", "x"), ("export",), ("purge", "--everything", "--yes")]
)
def test_a_mistyped_data_directory_is_named_and_not_made(
    capsys: pytest.CaptureFixture[str], data_dir: Path, arguments: tuple[str, ...]
) -> None:
    code, _, error = run(capsys, *arguments)
    assert (code, "EDGE_DATA_DIR" in error) == (5, True)
    assert not data_dir.exists()


def test_a_list_counts_by_environment_and_kind(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore
) -> None:
    found = as_json(capsys, "list", "--limit", "2")
    assert found["environments"] == [
        {
            "environment": "", "interactions": 4,
            "feedback": {"group": 1, "score": 2, "tool_calls": 1},
        },
        {
            "environment": "desk", "interactions": 2,
            "feedback": {"correction": 1, "preference": 2, "thumb": 1},
        },
        {"environment": "lab", "interactions": 1, "feedback": {"thumb": 1}},
    ]  # fmt: skip
    assert len(found["interactions"]) == 2
    (one,) = as_json(capsys, "list", "--user", "alice")["interactions"]
    assert (one["id"], one["verdict"], one["kinds"]) == (
        "chatcmpl-1", "correction", ["correction", "preference"],
    )  # fmt: skip
    (old,) = as_json(capsys, "list", "--older-than", "30d")["interactions"]
    assert old["id"] == "chatcmpl-3"
    assert len(as_json(capsys, "list", "--environment", "-")["interactions"]) == 4
    code, out, _ = run(capsys)
    assert (code, "desk" in out, "correction 1, preference 2, thumb 1" in out) == (0, True, True)


def test_what_waits_for_its_answer_is_counted(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore
) -> None:
    expecting = Teller(expects=frozenset({"later"}))
    store.give(Feedback("later", 1.0), max_tokens=9, teller=expecting)
    assert as_json(capsys, "list")["waiting"] == 1
    assert "1 feedback waits" in run(capsys, "list")[1]


def test_one_answer_is_shown_with_all_that_was_said(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore
) -> None:
    store.give(EpisodeFeedback("e", 1.0), max_tokens=99)
    shown = as_json(capsys, "show", "chatcmpl-1")
    assert (shown["verdict"], shown["messages"]) == ("correction", PROMPT)
    assert [one["kind"] for one in shown["feedback"]] == [
        "correction", "preference", "preference", "score",
    ]  # fmt: skip
    code, out, _ = run(capsys, "show", "chatcmpl-1")
    assert (code, "[user] question" in out, "comment so it is" in out) == (0, True, True)
    code, _, error = run(capsys, "show", "chatcmpl-9")
    assert (code, "chatcmpl-9" in error) == (1, True)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    code, out, _ = run(capsys, "export", *arguments)
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def answered(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_examples_are_exported_as_prompt_and_completion(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore
) -> None:
    made = {line["id"][-1]: line for line in lines(capsys, "--format", "sft")}
    assert set(made) == {"1", "2", "4"}
    assert made["1"] == {
        "prompt": PROMPT, "completion": answered("right"), "id": "chatcmpl-1",
        "model": "lorikeet@v1-aaaaaaaa", "environment": "desk",
    }  # fmt: skip
    assert made["2"]["completion"] == answered("answer 2")
    assert made["4"]["completion"][0]["tool_calls"] == json.loads(CALLS)
    (of_text,) = lines(capsys, "--format", "sft", "--texts")
    assert (of_text["prompt"], of_text["completion"]) == ("text", "answer 6")
    _, _, said = run(capsys, "export", "--format", "sft", "--json")
    assert json.loads(said)["left_out"] == {"they answer plain texts, not messages: see --texts": 1}


def test_thumbs_pairs_and_groups_are_exported(
    capsys: pytest.CaptureFixture[str],
    store: ExperienceStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thumbs = {line["id"][-1]: line["label"] for line in lines(capsys, "--format", "kto")}
    assert thumbs == {"2": True, "3": False}, "a corrected answer was not liked or disliked"
    (pair,) = lines(capsys, "--format", "dpo")
    assert (pair["chosen"], pair["rejected"]) == (answered("answer 2"), answered("answer 1"))
    code, _, error = run(capsys, "export", "--format", "groups")
    assert (code, "EDGE_BASE__PATH" in error) == (1, True), "a choice is known in token ids alone"
    monkeypatch.setattr("edge_node.experience_cli._decoder", lambda settings: str)
    (group,) = lines(capsys, "--format", "groups")
    assert group["completions"] == [answered("first"), answered("(5, 4)")]
    assert group["scores"] == [0.25, 1.0]


def test_everything_is_exported_to_a_file_of_ones_own(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore, tmp_path: Path
) -> None:
    out = tmp_path / "all.jsonl"
    code, said, _ = run(capsys, "export", "--out", str(out), "--json")
    assert (code, json.loads(said)) == (0, {"lines": 7, "left_out": {}, "file": str(out)})
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    made = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert made["chatcmpl-1"]["feedback"][0]["correction"] == "right"
    assert made["chatcmpl-7"]["unusable"] == "the prompt holds more than text"
    code, _, error = run(capsys, "export", "--out", str(out))
    assert (code, "nothing is overwritten" in error) == (1, True)


def test_a_purge_asks_first(capsys: pytest.CaptureFixture[str], store: ExperienceStore) -> None:
    code, out, _ = run(capsys, "purge", "--environment", "desk")
    assert (code, out.startswith("2 answers match. Nothing was deleted.")) == (1, True)
    assert run(capsys, "purge", "--environment", "desk", "--json")[0] == 1
    assert store.counts().interactions == 7
    purged = as_json(capsys, "purge", "--environment", "desk", "--yes")
    assert (purged["interactions"], purged["feedback"]) == (2, 4)
    assert "Deleted 1 answers" in run(capsys, "purge", "--older-than", "30d", "--yes")[1]
    assert as_json(capsys, "purge", "--everything", "--yes")["interactions"] == 4
    assert (store.counts().interactions, store.deleted()) == (0, 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("purge", "--yes"), "--everything"),
        (("purge", "--everything", "--user", "a", "--yes"), "--everything alone"),
        (("purge", "--older-than", "soon", "--yes"), "30d, 12h or 90m"),
        (("purge", "--older-than", "999999d", "--yes"), "30d, 12h or 90m"),
        (("list", "--limit", "-1"), "--limit"),
        (("export", "--format", "csv"), "csv"),
    ],
)
def test_arguments_that_mean_nothing_change_nothing(
    capsys: pytest.CaptureFixture[str],
    store: ExperienceStore,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    code, _, error = run(capsys, *arguments)
    assert (code, says in error) == (2, True), error
    assert store.counts().interactions == 7


def test_deleting_one_answers_in_json_too(
    capsys: pytest.CaptureFixture[str], store: ExperienceStore
) -> None:
    assert as_json(capsys, "delete", "chatcmpl-1") == {"deleted": "chatcmpl-1", "so_far": 1}
