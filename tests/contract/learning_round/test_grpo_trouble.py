"""What a grpo round meets besides its work: a vLLM that went away, changed settings, no gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_node.learning import exploration, gate
from edge_node.learning.policies import Policies
from edge_node.learning.records import RoundStore
from edge_node.learning.worker import Worker
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node
from tests.fakes.policy_vllm import policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import tiny_adapter

EVEN: dict[str, Any] = {
    "name": "even", "factory": "tests.fakes.even_words:EvenWords", "rollouts": True,
}  # fmt: skip
TEXTS = EVEN | {"factory": "tests.fakes.text_environment:Texts", "options": {}}
GRPO: dict[str, Any] = {
    "prompts": 8, "samples": 8, "max_answer_tokens": 2, "learning_rate": 1e-9, "steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PATIENCE_S", 5.0)
    monkeypatch.setattr(gate, "RETRY_S", 0.0)


def explorer(data_dir: Path, environment: dict[str, Any] = EVEN, **learning: Any) -> EdgeSettings:
    settings = make_node(data_dir, grpo=GRPO, supersede_after_s=0.0, **learning)
    fields = settings.model_dump()
    environments = [*fields["environments"], environment]
    return EdgeSettings.model_validate(fields | {"environments": environments})


def test_rounds_without_gain_come_to_an_end(tmp_path: Path) -> None:
    settings = explorer(tmp_path)
    activate(settings, LoraTensors(), version=0)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings):
        assert [worker.step() for _ in range(4)] == [True, True, True, False]
    end = RoundStore(settings.data_dir / "learning").ends()[0]
    assert end.state == "nothing to gain"
    assert end.result.endswith("it was the last of 3 rounds from this release")
    activate(settings, tiny_adapter(1, rank=2), version=1)
    assert worker._next_round() is not None, "another release is another start"


def test_a_vllm_that_starts_anew_before_the_gate_gets_both_versions_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = explorer(tmp_path)
    activate(settings, LoraTensors(), version=0)
    measure, tries = exploration.gain.measure, 0
    with sampling_vllm(settings) as (vllm, gateway):

        async def after_a_restart(*args: Any, **kwargs: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries == 1:
                vllm.loaded.clear()
                gateway.aliases._loaded.clear()
            return await measure(*args, **kwargs)

        monkeypatch.setattr(exploration.gain, "measure", after_a_restart)
        assert Worker(settings, NODE_ID).step()
    assert tries == 2
    assert not policies_on_disk(settings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"environments": [EVEN | {"rollouts": False}]}, "even is not in EDGE_ENVIRONMENTS with"),
        ({"environments": [TEXTS]}, "even has rollouts, and is one of texts"),
        ({"learning": {"method": "sft"}}, "EDGE_LEARNING__METHOD is sft now"),
        ({"serving": {"max_lora_rank": 8}}, "policy has rank 10, and EDGE_SERVING__MAX_LORA_RANK"),
    ],
)
def test_settings_that_were_changed_under_a_round_end_it(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    settings = explorer(tmp_path)
    activate(settings, tiny_adapter(1, rank=2), version=1)
    assert Worker(settings, NODE_ID)._next_round() is not None
    fields = settings.model_dump()
    for name, change in changes.items():
        fields[name] = fields[name] | change if isinstance(change, dict) else change
    Worker(EdgeSettings.model_validate(fields), NODE_ID).step()
    assert RoundStore(settings.data_dir / "learning").last_was_abandoned()
    (problem,) = Problems(settings.data_dir).current()
    assert text in problem.text
    assert not outbox_of(settings).list()


def test_a_round_begins_without_the_policies_of_killed_learners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the load of a policy and the unload of the one before, it leaves two."""
    settings = explorer(tmp_path)
    activate(settings, LoraTensors(), version=0)
    with sampling_vllm(settings) as (vllm, gateway):
        for name in ("policy/r1.a@1", "policy/r1.a@2"):
            gateway.aliases.add(name, next(iter(vllm.loaded.values())))
            vllm.loaded[name] = next(iter(vllm.loaded.values()))
        most, publish = 0, Policies.publish

        async def counted(self: Policies, step: int, increment: LoraTensors) -> str:
            nonlocal most
            most = max(most, sum(name.startswith("policy/") for name in vllm.loaded))
            return await publish(self, step, increment)

        monkeypatch.setattr(Policies, "publish", counted)
        assert Worker(settings, NODE_ID).step()
    assert most <= 1, "settings keep room for two policies in vLLM"
