"""The likelihood of texts by a real vLLM on CPU, beside transformers with PEFT."""

from __future__ import annotations

import math

import pytest

from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.settings import EnvironmentSpec
from tests.fakes.text_environment import Texts
from tests.fakes.tiny_model import POSITIONS, text_ids
from tests.integration import likelihoods
from tests.integration.serving_node import serving_node

pytestmark = [pytest.mark.timeout(420), pytest.mark.slow]

DOCUMENTS = 12


@pytest.mark.parametrize("words", [30, POSITIONS + 100], ids=["short", "longer than served"])
async def test_what_a_node_reports_is_what_transformers_finds(
    monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = Texts(DOCUMENTS, words)
    spec = EnvironmentSpec(name="text", factory="x:Y", anchor=True)
    async with serving_node({1: 4, 2: 2}, dtype="float32") as node:
        evaluator = Evaluator(node.control.requests, {"text": (spec, lambda: environment)}, seed=5)
        candidate, reference = node.versions
        result = await evaluator.compare("text", candidate, reference, 0, 100, Sampling())
        same = await evaluator.compare("text", candidate, candidate, 0, 100, Sampling())
        documents = environment.documents("held_out", count=100, seed=5)
        ids = [text_ids(document.text)[: POSITIONS - 1] for document in documents]
        means = {
            version: [
                math.fsum(likelihoods.of_transformers(one, node.directory(version)))
                / (len(one) - 1)
                for one in ids
            ]
            for version in node.versions
        }
        assert node.vllm.generation == 1
    found = result.likelihood
    differences = [a - b for a, b in zip(means[candidate], means[reference], strict=True)]
    assert (found.documents, found.tokens) == (DOCUMENTS, sum(len(one) - 1 for one in ids))
    assert found.reference_mean == pytest.approx(sum(means[reference]) / DOCUMENTS, abs=1e-4)
    assert found.candidate_mean == pytest.approx(sum(means[candidate]) / DOCUMENTS, abs=1e-4)
    assert found.difference_sum == pytest.approx(math.fsum(differences), abs=1e-3)
    squares = math.fsum(value * value for value in differences)
    assert found.difference_square_sum == pytest.approx(squares, rel=1e-3)
    assert same.likelihood.difference_square_sum < 1e-8
