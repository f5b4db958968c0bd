"""The quickstart's environments: deterministic, split cleanly, and judged by what a call does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from edge_node.environments import Environment, Task
from examples.quickstart import house
from examples.quickstart.environments import CompanyApi, Node, PublicTenants
from examples.quickstart.verifier import ErrorKind

ALL = [CompanyApi("A"), CompanyApi("B"), CompanyApi("C"), CompanyApi("D"), PublicTenants()]


def texts(tasks: Any) -> set[str]:
    return {task.messages[0]["content"] for task in tasks}


def words(environment: CompanyApi, slot: str) -> set[str]:
    """Words that occur as whole words of the slot in 600 tasks."""
    names = {
        "verb": house.VERBS,
        "site": house.SITES,
        "priority": house.PRIORITIES,
        "service": house.SERVICES,
    }[slot]
    seen = " ".join(texts(environment.tasks("train", count=600, seed=1)))
    for mark in "[]/:,()":
        seen = seen.replace(mark, " ")
    return set(names) & set(seen.split())


@pytest.mark.parametrize("environment", ALL, ids=lambda environment: environment._name)
class TestEveryEnvironment:
    def test_keeps_the_contract(self, environment: Environment) -> None:
        assert isinstance(environment, Environment)

    def test_same_arguments_same_tasks(self, environment: Environment) -> None:
        first = environment.tasks("train", count=30, seed=3)
        assert first == environment.tasks("train", count=30, seed=3)
        assert texts(first) != texts(environment.tasks("train", count=30, seed=4))
        assert list(first[:10]) == list(environment.tasks("train", count=10, seed=3))

    def test_splits_share_no_text_and_tasks_are_distinct(self, environment: Environment) -> None:
        train = [environment.tasks("train", count=400, seed=seed) for seed in range(3)]
        held_out = [environment.tasks("held_out", count=400, seed=seed) for seed in range(3)]
        assert len(texts(train[0])) == 400
        assert len({task.id for task in held_out[0]}) == 400
        assert not set.union(*map(texts, train)) & set.union(*map(texts, held_out))

    def test_reference_answers_verify(self, environment: Environment) -> None:
        for task in environment.tasks("held_out", count=100, seed=0):
            answer = environment.reference_answer(task)
            assert answer is not None
            outcome = environment.verify(task, answer)
            assert (outcome.passed, outcome.score, outcome.correction) == (True, 1.0, None)

    def test_correction_of_a_failure_verifies(self, environment: Environment) -> None:
        task = environment.tasks("train", count=1, seed=0)[0]
        outcome = environment.verify(task, "I cannot do that.")
        assert not outcome.passed
        assert outcome.correction is not None
        assert environment.verify(task, outcome.correction).passed

    def test_unknown_split_is_refused(self, environment: Environment) -> None:
        with pytest.raises(ValueError, match="Unknown split 'test'"):
            environment.tasks("test", count=1, seed=0)  # type: ignore[arg-type]

    def test_task_data_survives_json(self, environment: Environment) -> None:
        task = environment.tasks("train", count=1, seed=0)[0]
        answer = environment.reference_answer(task)
        again = Task(task.id, task.messages, json.loads(json.dumps(task.data)))
        assert environment.verify(again, answer or "").passed


class TestVerifierNamesTheMistake:
    environment = CompanyApi("A")

    def complete_task(self) -> Task:
        """A task with priority and quantity, so that every argument can be broken."""
        for task in self.environment.tasks("train", count=100, seed=0):
            if len(json.loads(self.environment.reference_answer(task))) == 6:
                return task
        raise AssertionError("no task with all arguments")

    def reason(self, **changes: Any) -> str:
        task = self.complete_task()
        call = json.loads(self.environment.reference_answer(task))
        call.update(changes)
        outcome = self.environment.verify(
            task, json.dumps({k: v for k, v in call.items() if v is not None})
        )
        assert not outcome.passed
        return outcome.reason

    @pytest.mark.parametrize("answer", ["", "{", "[]", '"x"', "[" * 100_000, "nul\x00", "9" * 5000])
    def test_bad_json(self, answer: str) -> None:
        outcome = self.environment.verify(self.complete_task(), answer)
        assert outcome.reason.startswith(ErrorKind.BAD_JSON)

    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            ({"svc": "nothing"}, ErrorKind.UNKNOWN_SERVICE),
            ({"svc": None}, ErrorKind.UNKNOWN_SERVICE),
            ({"op": "open"}, ErrorKind.UNKNOWN_OPERATION),
            ({"op": ["a"]}, ErrorKind.UNKNOWN_OPERATION),
            ({"ref": "12345"}, ErrorKind.UNKNOWN_RECORD),
            ({"loc": "lyon"}, ErrorKind.UNKNOWN_SITE),
            ({"pri": "urgent"}, ErrorKind.BAD_ARGUMENT),
            ({"qty": "7"}, ErrorKind.BAD_ARGUMENT),
            ({"qty": True}, ErrorKind.BAD_ARGUMENT),
            ({"qty": 0}, ErrorKind.BAD_ARGUMENT),
            ({"extra": 1}, ErrorKind.BAD_ARGUMENT),
            ({"pri": None}, ErrorKind.WRONG_STATE),
            ({"qty": None}, ErrorKind.WRONG_STATE),
            ({"qty": 1000}, ErrorKind.WRONG_STATE),
        ],
    )
    def test_broken_argument(self, changes: dict[str, Any], kind: ErrorKind) -> None:
        assert self.reason(**changes).startswith(kind)

    def test_wrong_but_known_words_change_the_wrong_state(self) -> None:
        task = self.complete_task()
        call = json.loads(self.environment.reference_answer(task))
        acme = house.company_house("acme", 0)
        for key, slot in (("op", "verb"), ("loc", "site"), ("pri", "priority")):
            other = next(code for code in acme.codes[slot].values() if code != call[key])
            assert self.reason(**{key: other}).startswith(ErrorKind.WRONG_STATE)

    def test_wrong_record_of_the_database(self) -> None:
        task = self.complete_task()
        (records,) = task.data["database"].values()
        assert len(records) == 5
        ref = json.loads(self.environment.reference_answer(task))["ref"]
        other = next(other for other in records if other != ref)
        assert self.reason(ref=other).startswith(ErrorKind.WRONG_STATE)

    def test_key_order_and_spaces_do_not_matter(self) -> None:
        task = self.complete_task()
        call = json.loads(self.environment.reference_answer(task))
        assert self.environment.verify(
            task, json.dumps(dict(reversed(call.items())), indent=1)
        ).passed


class TestWhoKnowsWhat:
    def test_a_and_b_are_overlapping_halves_and_c_needs_both(self) -> None:
        a, b, c = CompanyApi("A"), CompanyApi("B"), CompanyApi("C")
        for slot, half, shared in (("verb", 8, 4), ("site", 8, 4), ("priority", 3, 2)):
            assert len(words(a, slot)) == len(words(b, slot)) == half
            assert len(words(a, slot) & words(b, slot)) == shared
            assert words(a, slot) | words(b, slot) == words(c, slot)
        services = [words(environment, "service") for environment in (a, b, c)]
        assert [len(names) for names in services] == [4, 4, 3]
        assert len(set.union(*services)) == 11

    def test_a_b_c_share_one_code_book(self) -> None:
        nodes: tuple[Node, ...] = ("A", "B", "C")
        books = [CompanyApi(node)._houses["acme"] for node in nodes]
        assert books[0] == books[1] == books[2]

    @pytest.mark.parametrize("seed", range(5))
    def test_d_has_the_words_of_a_and_contradicts_every_code(self, seed: int) -> None:
        a, d = CompanyApi("A", seed), CompanyApi("D", seed)
        for slot in ("verb", "site", "priority", "service"):
            assert words(a, slot) == words(d, slot)
        acme, zeta = house.company_house("acme", seed), house.company_house("zeta", seed)
        for slot, book in acme.codes.items():
            assert all(zeta.codes[slot][word] != code for word, code in book.items())

    def test_codes_are_unique_within_a_company(self) -> None:
        for company in (*house.public_houses().values(), house.company_house("acme", 0)):
            codes = [code for book in company.codes.values() for code in book.values()]
            assert len(codes) == len(set(codes)) == 28

    def test_another_seed_is_another_world_but_public_tenants_stay(self) -> None:
        assert house.company_house("acme", 0) != house.company_house("acme", 1)
        assert PublicTenants(0)._houses == PublicTenants(1)._houses

    def test_unknown_node_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Unknown node 'F'; expected one of A, B, C, D, E"):
            CompanyApi("F")  # type: ignore[arg-type]


def test_environments_import_no_machine_learning() -> None:
    code = (
        "import sys, examples.quickstart.environments, examples.quickstart.model;"
        "heavy = ('torch', 'transformers', 'numpy', 'vllm')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
