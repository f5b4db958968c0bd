"""Likelihood of texts over real HTTP: the pairs, what is cut, what makes a node abstain."""

from __future__ import annotations

from typing import Any

import pytest

from edge_node.environments import Document
from edge_node.errors import EnvironmentFault, NoLikelihood, ServingError
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.settings import EnvironmentSpec
from tests.contract.release_watcher.endpoint import (
    GREEDY,
    MAX_MODEL_LEN,
    Likelihood,
    counts,
    reading,
)
from tests.fakes.broken_environments import made
from tests.fakes.endpoint import at
from tests.fakes.text_environment import Texts


class Fixed(Texts):
    """These documents, in this order."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self._texts = texts

    def documents(self, split: Any, *, count: int, seed: int) -> list[Document]:
        return [Document(f"d{number}", text) for number, text in enumerate(self._texts)][:count]


def texts(environment: Any, anchor: bool = False) -> dict[str, Any]:
    return {
        "text": (EnvironmentSpec(name="text", factory="x:Y", anchor=anchor), lambda: environment)
    }


async def measure(environment: Any, likelihood: Likelihood, *, first: int = 0) -> Any:
    async with reading(likelihood) as (url, _):
        return await Evaluator(at(url), texts(environment)).compare(
            "text", "new", "old", first, 10, GREEDY
        )


def by_number(model: str, token: str) -> float:
    """A token `5` has -5, for the candidate -6."""
    return -float(token) - (model == "new")


async def test_each_document_counts_once_whatever_its_length() -> None:
    async with reading(by_number) as (url, requests):
        result = await Evaluator(at(url), texts(Fixed("9 1 2 3", "9 4"), anchor=True)).compare(
            "text", "new", "old", 0, 10, GREEDY
        )
    likelihood = result.likelihood
    assert (likelihood.documents, likelihood.tokens) == (2, 4)
    assert (likelihood.reference_mean, likelihood.candidate_mean) == (-3.0, -4.0)
    assert (likelihood.difference_sum, likelihood.difference_square_sum) == (-2.0, 2.0)
    assert counts(result) == (0, 0, 0, 0)
    assert result.anchor
    assert not result.HasField("every_attempt")
    assert {body["model"] for body in requests} == {"new", "old"}
    assert {(body["max_tokens"], body["prompt_logprobs"]) for body in requests} == {(1, 0)}


async def test_a_document_longer_than_the_model_serves_is_cut_alike_for_both() -> None:
    result = await measure(Fixed("1 " * 40), by_number)
    assert result.likelihood.tokens == MAX_MODEL_LEN - 2, "the first has no value, one is to come"


async def test_several_attempts_at_tasks_read_a_text_once() -> None:
    async with reading(by_number) as (url, requests):
        result = await Evaluator(at(url), texts(Fixed("1 2"))).compare(
            "text", "new", "old", 0, 10, Sampling(5, 0.8)
        )
    assert (len(requests), result.attempts) == (2, 1)


async def test_further_documents_are_others_until_there_are_none() -> None:
    async with reading(lambda model, token: -1.0) as (url, requests):
        evaluator = Evaluator(at(url), texts(Texts(24)), seed=3)
        looks = [
            await evaluator.compare("text", "new", "old", first, tasks, GREEDY)
            for first, tasks in ((0, 10), (10, 10), (20, 20), (40, 40))
        ]
    assert [result.likelihood.documents for result in looks] == [10, 10, 4, 0]
    assert [result.first_task for result in looks] == [0, 10, 20, 40]
    assert not looks[-1].HasField("likelihood")
    assert len({result.tasks_digest for result in looks}) == 4
    assert len({body["prompt"] for body in requests if body["model"] == "new"}) == 24


@pytest.mark.parametrize("value", [-9999.0, -1e9, float("nan")])
async def test_a_value_that_is_not_finite_is_no_result(value: float) -> None:
    with pytest.raises(NoLikelihood, match=r"new gives a token of document 'd1'.*no finite"):
        await measure(Fixed("1 2", "1 3"), lambda m, t: value if (m, t) == ("new", "3") else -1)


async def test_a_document_without_a_second_token_is_named() -> None:
    with pytest.raises(
        EnvironmentFault, match="'d1' of environment 'text' has fewer than two tokens"
    ):
        await measure(Fixed("1 2", "the"), by_number)


async def test_an_environment_that_raises_is_named_without_its_words() -> None:
    with made("Reading", "raise") as process:
        evaluator = Evaluator(at("http://127.0.0.1:9"), {"t": (process.spec, process.environment)})
        with pytest.raises(EnvironmentFault, match="'acme' raised KeyError in documents") as raised:
            await evaluator.compare("t", "new", "old", 0, 10, GREEDY)
        assert "secret" not in str(raised.value)
        later = await evaluator.compare("t", "new", "old", 10, 10, GREEDY)
        assert not later.HasField("likelihood")


async def test_a_vllm_that_answers_with_an_error_gives_no_result() -> None:
    def broken(model: str, token: str) -> float:
        raise ZeroDivisionError

    with pytest.raises(ServingError, match="answered 500 to an evaluation request") as raised:
        await measure(Fixed("secret words"), broken)
    assert "secret" not in str(raised.value)
