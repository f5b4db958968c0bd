"""An evaluation over real HTTP: looks, the digest of tasks, attempts, environments that break."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edge_node.environments import Outcome, Task
from edge_node.errors import EnvironmentFault
from edge_node.releases.evaluation import Evaluator, Sampling
from tests.contract.release_watcher.endpoint import GREEDY, asked, counts, serving, words
from tests.fakes.broken_environments import SECRET, made
from tests.fakes.endpoint import at
from tests.fakes.word_environment import NextWord


async def test_looks_ask_tasks_that_no_earlier_look_had_until_there_are_none() -> None:
    async with serving(lambda model, number, body: model == "new" or number % 4 == 1) as (
        url,
        requests,
    ):
        evaluator = Evaluator(at(url), words(anchor=True), seed=7)
        looks = [
            await evaluator.compare("words", "new", "old", first, tasks, GREEDY)
            for first, tasks in ((0, 20), (20, 20), (40, 40), (80, 80))
        ]
    assert [sum(counts(result)) for result in looks] == [20, 20, 10, 0]
    assert [result.first_task for result in looks] == [0, 20, 40, 80]
    assert sum(result.only_candidate_passed for result in looks) == 25
    assert len(set(asked(requests, "new"))) == len(asked(requests, "new")) == 50
    assert sorted(asked(requests, "old")) == sorted(asked(requests, "new"))
    assert len({result.tasks_digest for result in looks}) == 4
    assert all(result.anchor and not result.HasField("every_attempt") for result in looks)
    assert {body["temperature"] for body in requests} == {0}


@pytest.mark.parametrize("bound", [None, 24])
async def test_an_answer_is_bounded_as_the_operator_says(bound: int | None) -> None:
    async with serving(lambda model, number, body: True) as (url, requests):
        evaluator = Evaluator(at(url), words(), max_answer_tokens=bound)
        await evaluator.compare("words", "new", "old", 0, 4, GREEDY)
        await evaluator.compare("words", "new", "old", 4, 4, Sampling(2, 0.8))
    assert len(requests) == 8 + 16
    assert {body.get("max_tokens") for body in requests} == {bound}


async def test_the_same_tasks_in_another_order_have_the_same_digest() -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        whole = [
            await Evaluator(at(url), words(20), seed).compare("words", "n", "o", 0, 10, GREEDY)
            for seed in (1, 2)
        ]
        part = [
            await Evaluator(at(url), words(), seed).compare("words", "n", "o", 0, 10, GREEDY)
            for seed in (1, 2)
        ]
    assert whole[0].tasks_digest == whole[1].tasks_digest
    assert part[0].tasks_digest != part[1].tasks_digest


@pytest.mark.parametrize("how", ["unordered", "bounded"])
async def test_an_environment_that_cannot_give_further_tasks_gives_none(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        with made("Tasks", how) as process:
            evaluator = Evaluator(at(url), {"e": (process.spec, process.environment)})
            assert sum(counts(await evaluator.compare("e", "new", "old", 0, 20, GREEDY))) == 20
            assert sum(counts(await evaluator.compare("e", "new", "old", 20, 20, GREEDY))) == 0
    assert SECRET not in caplog.text + repr([vars(record) for record in caplog.records])


async def test_a_verifier_that_waits_takes_no_thread_that_the_node_needs() -> None:
    began, goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    class Waiting(NextWord):
        def verify(self, task: Task, answer: str) -> Outcome:
            loop.call_soon_threadsafe(began.set)
            assert goes_on.wait(20)
            return super().verify(task, answer)

    ((spec, _),) = words().values()
    async with serving(lambda model, number, body: True) as (url, _):
        evaluator = Evaluator(at(url), {"words": (spec, Waiting)})
        compared = asyncio.create_task(evaluator.compare("words", "n", "o", 0, 4, GREEDY))
        await began.wait()
        try:
            async with asyncio.timeout(10):
                await asyncio.to_thread(goes_on.set)
        finally:
            goes_on.set()
        assert sum(counts(await compared)) == 4


async def test_an_environment_that_ends_is_no_environment_without_further_tasks() -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        with made("Tasks", "crash") as process:
            evaluator = Evaluator(at(url), {"e": (process.spec, process.environment)})
            with pytest.raises(EnvironmentFault, match="killed by SIGSEGV"):
                await evaluator.compare("e", "new", "old", 20, 20, GREEDY)


async def test_several_attempts_share_their_seeds_and_count_pass_1_and_pass_k() -> None:
    tries: dict[tuple[str, int], int] = {}

    def answer(model: str, number: int, body: dict[str, Any]) -> bool:
        tries[model, number] = tries.get((model, number), 0) + 1
        return model == "old" or number % 3 == 0 or tries[model, number] < 3

    async with serving(answer) as (url, requests):
        result = await Evaluator(at(url), words()).compare(
            "words", "new", "old", 0, 30, Sampling(3, 0.8)
        )
    third = len([word for word in set(asked(requests, "new")) if int(word[1:]) % 3 == 0])
    assert counts(result) == (30, 0, 0, 0)
    assert counts(result.every_attempt) == (third, 30 - third, 0, 0)
    assert result.attempts == 3
    seeds = {
        model: {(b["messages"][0]["content"], b["seed"]) for b in requests if b["model"] == model}
        for model in ("new", "old")
    }
    assert seeds["new"] == seeds["old"]
    assert len(seeds["old"]) == 90
    assert {body["temperature"] for body in requests} == {0.8}


async def test_attempts_end_with_the_first_that_fails() -> None:
    async with serving(lambda model, number, body: False) as (url, requests):
        result = await Evaluator(at(url), words()).compare(
            "words", "new", "old", 0, 10, Sampling(5, 0.8)
        )
    assert counts(result) == counts(result.every_attempt) == (0, 0, 0, 10)
    assert len(requests) == 20


async def test_a_verifier_that_raises_is_named_without_its_words() -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        with made("Verifying", "raise") as process:
            evaluator = Evaluator(at(url), {"acme": (process.spec, process.environment)})
            with pytest.raises(
                EnvironmentFault,
                match=r"Environment 'acme' raised KeyError in verify \(.*\.py:\d+\)",
            ) as raised:
                await evaluator.compare("acme", "new", "old", 0, 5, GREEDY)
    assert "secret" not in str(raised.value)
