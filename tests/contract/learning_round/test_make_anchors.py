"""`edge-node anchors make`: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_node.cli import main
from edge_node.errors import EdgeError
from edge_node.learning.anchors import Anchors, read_anchors, read_states
from edge_node.learning.make_anchors import ANSWER_TOKENS, PLAIN_TOKENS, start_of_text
from edge_node.learning.questions import OPEN_FILE, QA_FILE, read_open, read_qa
from edge_node.learning.teacher import base_states
from edge_node.learning.text_model import load_text_model
from edge_node.rendering import load_renderer
from protos.base import read_base_model
from tests.fakes.anchors import ANY, lines, make_tiny_anchors
from tests.fakes.tiny_model import prompt_ids, tiny_model

BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("EDGE_DATA_DIR", str(tmp_path / "no-data"))
    monkeypatch.setenv("EDGE_BASE__PATH", str(tiny_model()))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["anchors", "make", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def read(path: Path) -> Anchors:
    return read_anchors(path, read_base_model(tiny_model()).digest)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_command_writes_samples_of_each_kind_with_the_bases_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_file = lines(tmp_path / "x", "open", [{"question": "w1"}, {"question": "w2 w3"}])
    qa_file = lines(
        tmp_path / "x",
        "qa",
        [{"question": "w5", "answers": ANY}, {"question": "w6", "answers": ["nothing says this"]}],
    )
    out = tmp_path / "deep" / "anchors"
    code, said, _ = run(
        capsys, "--out", str(out), "--seed", "7", "--plain", "3", "--open", str(open_file),
        "--questions", str(qa_file),
    )  # fmt: skip
    assert code == 0
    assert f"Anchors in {out}: 3 plain, 2 open, 1 qa, " in said
    assert "1 of 2 questions were answered right" in said
    assert sorted(contents(out)) == ["anchors.json", "hidden.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["anchors"]
    assert not (tmp_path / "no-data").exists(), "it needs the base alone"

    index = json.loads((out / "anchors.json").read_bytes())
    assert (index["format"], index["seed"], index["dtype"]) == (1, 7, "float32")
    anchors = read(out)
    assert Counter(sample.kind for sample in anchors.samples) == {"plain": 3, "open": 2, "qa": 1}
    for sample in anchors.samples:
        if sample.kind == "plain":
            assert (len(sample.ids), sample.prompt, sample.ids[0]) == (PLAIN_TOKENS, 1, BOS)
        else:
            answer = sample.ids[sample.prompt :]
            assert len(answer) <= ANSWER_TOKENS[sample.kind]
            assert EOS not in answer[:-1]
            assert answer[-1] == EOS or len(answer) == ANSWER_TOKENS[sample.kind]
    prompts = [tuple(s.ids[: s.prompt]) for s in anchors.samples if s.kind != "plain"]
    assert prompts == [prompt_ids("w1"), prompt_ids("w2 w3"), prompt_ids("w5")]

    base = load_text_model(tiny_model())
    greedy = anchors.samples[-1]
    expected = greedy.ids[: greedy.prompt]
    while len(expected) < len(greedy.ids):
        with torch.no_grad():
            expected = [*expected, int(base(torch.tensor([expected])).logits[0, -1].argmax())]
    assert greedy.ids == expected
    for sample, states in zip(anchors.samples, read_states(anchors), strict=True):
        assert torch.equal(states, base_states(base, sample.ids).bfloat16())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        contents(make_tiny_anchors(tmp_path / name, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert first["anchors.json"] != other["anchors.json"]


def test_the_bases_own_way_of_sampling_is_left_aside(tmp_path: Path) -> None:
    """A top_k or a penalty would give samples that are not the base's distribution."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    own = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 3.0}
    config = json.loads((base / "generation_config.json").read_bytes())
    (base / "generation_config.json").write_text(json.dumps(config | own))
    plain, changed = (
        json.loads(contents(make_tiny_anchors(tmp_path / name, base=path))["anchors.json"])
        for name, path in (("a", tiny_model()), ("b", base))
    )
    assert plain["base"] != changed["base"]
    assert plain["samples"] == changed["samples"]


def test_a_directory_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    code, _, said = run(capsys, "--out", str(tmp_path / "out"))
    assert (code, "exists. Anchors are never overwritten" in said) == (5, True)
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_left_behind_when_the_disk_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_node.learning.make_anchors.publish", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left on device"):
        make_tiny_anchors(tmp_path / "deep" / "out")
    assert not [path for path in (tmp_path / "deep").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("option", "line", "words"),
    [
        ("--open", '{"question": "w1"}\n\n{"question": 5}', "line 3: question: Input should be a"),
        ("--open", '{"question": "w1"', "line 1: Invalid JSON"),
        ("--open", '{"question": "w1", "answers": []}', "line 1: answers: Extra inputs"),
        ("--questions", '{"question": "w1"}', "line 1: answers: Field required. Expected {"),
        ("--questions", '{"question": "w1", "answers": []}', "line 1: answers: List should have"),
        ("--questions", '{"question": "", "answers": ["a"]}', "line 1: question: String should"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, line: str, words: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    code, _, said = run(capsys, "--out", str(tmp_path / "out"), option, str(file))
    assert (code, said.count("\n")) == (1, 1)
    assert f"edge-node: {file}, {words}" in said
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    code, _, said = run(capsys, "--out", out, "--open", str(tmp_path / "none.jsonl"))
    assert (code, "none.jsonl cannot be read" in said) == (1, True)
    monkeypatch.delenv("EDGE_BASE__PATH")
    code, _, said = run(capsys, "--out", out)
    assert (code, "EDGE_BASE__PATH is not set" in said) == (2, True)


def test_a_base_without_a_chat_template_writes_plain_samples_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    settings = json.loads((base / "tokenizer_config.json").read_bytes())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("EDGE_BASE__PATH", str(base))
    code, _, said = run(capsys, "--out", str(tmp_path / "out"))
    assert (code, "no chat template that takes a question: ValueError" in said) == (1, True)
    assert "make plain anchors alone: --open /dev/null --questions /dev/null" in said
    alone = ("--open", "/dev/null", "--questions", "/dev/null", "--out", str(tmp_path / "out"))
    code, said, _ = run(capsys, *alone, "--plain", "2")
    assert (code, "2 plain, 0 open, 0 qa" in said) == (0, True)


def test_no_sample_at_all_is_an_error(tmp_path: Path) -> None:
    wrong = lines(tmp_path / "x", "qa", [{"question": "w5", "answers": ["nothing says this"]}])
    none = lines(tmp_path / "x", "open", [])
    with pytest.raises(EdgeError, match=r"There is no sample: --plain is 0.*none of the 1 questi"):
        make_tiny_anchors(tmp_path / "out", plain=0, open_file=none, qa_file=wrong)
    assert not (tmp_path / "out").exists()


def test_a_text_begins_with_bos_unless_that_begins_a_turn() -> None:
    tokenizer = load_renderer(tiny_model()).tokenizer
    assert start_of_text(tokenizer) == BOS
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}{% endfor %}"
    assert start_of_text(tokenizer) == EOS
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert start_of_text(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>") > 200
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    assert start_of_text(tokenizer) == BOS
    tokenizer.bos_token = None
    assert start_of_text(tokenizer) > 200


def test_our_own_questions_are_usable_and_each_is_asked_once() -> None:
    questions, known = read_open(OPEN_FILE), read_qa(QA_FILE)
    assert (len(questions), len(known)) == (32, 62)
    asked = [question.question for question in [*questions, *known]]
    assert len(set(asked)) == len(asked)
    assert max(map(len, asked)) < 80


def test_an_answer_is_right_when_it_holds_a_known_one_as_words() -> None:
    (question,) = (q for q in read_qa(QA_FILE) if q.question == "What is the capital of Italy?")
    assert question.is_right("The capital of Italy is ROME.")
    assert not question.is_right("Romeo and Juliet")
    (water,) = (q for q in read_qa(QA_FILE) if "formula" in q.question)
    assert water.is_right("It is H₂O.")
