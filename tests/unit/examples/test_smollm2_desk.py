"""The desk, the questions and the English of SmolLM2's world: deterministic, and split cleanly."""

from __future__ import annotations

import json
from importlib import resources
from typing import cast

import pytest

from edge_node.environments import Environment, TextEnvironment
from examples.smollm2 import desk
from examples.smollm2.desk import Desk, EnglishText, Node, Questions, house_book

NODES = cast("tuple[Node, ...]", ("A", "B", "C"))


def text_of(task: object) -> str:
    return task.messages[0]["content"]  # type: ignore[attr-defined, no-any-return]


class TestDesk:
    def test_keeps_the_contract(self) -> None:
        assert isinstance(Desk("A"), Environment)
        tasks = Desk("A", seed=3).tasks("train", count=200, seed=5)
        assert tasks == Desk("A", seed=3).tasks("train", count=200, seed=5)
        assert tasks[:50] == Desk("A", seed=3).tasks("train", count=50, seed=5)
        assert len({text_of(task) for task in tasks}) == len({task.id for task in tasks}) == 200

    def test_splits_share_no_text(self) -> None:
        for node in NODES:
            train = {text_of(task) for task in Desk(node).tasks("train", count=800, seed=0)}
            held_out = {text_of(task) for task in Desk(node).tasks("held_out", count=800, seed=1)}
            assert not train & held_out

    def test_c_needs_what_a_and_b_know(self) -> None:
        """Each product and problem of C is met by A or B, and neither of them meets all."""
        for kind in (desk.NODE_PRODUCTS, desk.NODE_PROBLEMS):
            a, b, c = (set(kind[node]) for node in NODES)
            assert a | b == c
            assert a & b
            assert a != c != b

    def test_only_the_nodes_own_products_and_problems_are_met(self) -> None:
        for node in NODES:
            met = " ".join(text_of(task) for task in Desk(node).tasks("train", count=600, seed=0))
            products = {product for product in desk.PRODUCTS if product in met}
            problems = {n for n, words in enumerate(desk.PROBLEMS) if any(w in met for w in words)}
            assert products == set(desk.NODE_PRODUCTS[node])
            assert problems == set(desk.NODE_PROBLEMS[node])

    def test_the_answer_is_the_house_books(self) -> None:
        teams, steps = house_book(2)
        for task in Desk("C", seed=2).tasks("held_out", count=100, seed=0):
            product = next(p for p in desk.PRODUCTS if p in text_of(task))
            problem = next(
                n for n, words in enumerate(desk.PROBLEMS) if any(w in text_of(task) for w in words)
            )
            assert task.data["answer"] == f"team {teams[product]}, step {steps[problem]}"

    def test_all_nodes_have_one_book_and_a_seed_another(self) -> None:
        assert house_book(0) == house_book(0) != house_book(1)
        teams, steps = house_book(0)
        assert sorted(teams.values()) == sorted([*desk.TEAMS, *desk.TEAMS])
        assert sorted(steps) == sorted(desk.STEPS)

    def test_exact_answers_pass_and_others_get_a_correction(self) -> None:
        environment = Desk("A")
        task = environment.tasks("train", count=1, seed=0)[0]
        right = environment.reference_answer(task)
        assert environment.verify(task, f" {right}\n").passed
        for wrong in ("", right.upper(), f"{right}.", "team Bern", "\x00" * 10_000):
            outcome = environment.verify(task, wrong)
            assert (outcome.passed, outcome.score, outcome.correction) == (False, 0.0, right)

    def test_mistakes_of_the_caller_are_named(self) -> None:
        with pytest.raises(ValueError, match="Unknown node 'D'; expected one of A, B, C"):
            Desk(cast(Node, "D"))
        with pytest.raises(ValueError, match="Unknown split 'test'"):
            Desk("A").tasks("test", count=1, seed=0)  # type: ignore[arg-type]


class TestQuestions:
    def test_keeps_the_contract(self) -> None:
        assert isinstance(Questions(), Environment)
        tasks = Questions().tasks("held_out", count=50, seed=1)
        assert tasks == Questions().tasks("held_out", count=50, seed=1)
        assert tasks[:10] == Questions().tasks("held_out", count=10, seed=1)
        assert tasks != Questions().tasks("held_out", count=50, seed=2)
        everything = Questions().tasks("held_out", count=10_000, seed=1)
        assert len({task.id for task in everything}) == len(everything) == 90
        assert Questions().tasks("train", count=50, seed=1) == []

    def test_none_is_trained_on(self) -> None:
        ours = {text_of(task) for task in Questions().tasks("held_out", count=10_000, seed=0)}
        for name in ("qa.jsonl", "open.jsonl"):
            lines = (resources.files("edge_node.learning") / "questions" / name).read_text()
            assert not ours & {json.loads(line)["question"] for line in lines.splitlines()}

    def test_one_of_the_words_has_to_be_said(self) -> None:
        environment = Questions()
        tasks = {text_of(t): t for t in environment.tasks("held_out", count=100, seed=0)}
        task = tasks["What is the capital of India?"]
        assert environment.verify(task, "The capital of india is NEW DELHI.").passed
        assert not environment.verify(task, "It is Newdelhiville or Mumbai.").passed
        assert environment.verify(task, "").correction == "New Delhi"

    def test_every_reference_answer_passes(self) -> None:
        environment = Questions()
        for task in environment.tasks("held_out", count=100, seed=0):
            assert environment.verify(task, environment.reference_answer(task)).passed


class TestEnglish:
    def test_keeps_the_contract(self) -> None:
        assert isinstance(EnglishText(), TextEnvironment)
        documents = EnglishText().documents("held_out", count=100, seed=1)
        assert len({document.id for document in documents}) == len(documents) == 40
        assert documents[:10] == EnglishText().documents("held_out", count=10, seed=1)
        assert documents != EnglishText().documents("held_out", count=100, seed=2)
        assert EnglishText().documents("train", count=100, seed=1) == []

    def test_paragraphs_have_a_few_sentences(self) -> None:
        for document in EnglishText().documents("held_out", count=100, seed=0):
            assert 60 <= len(document.text.split()) <= 100
            assert document.text.endswith(".")
            assert "\n" not in document.text
