"""The tiny world of two tool calls: its tasks, its rewards, and the text that its base has seen."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from edge_node.environments.tools import tool_schemas
from edge_node.episodes import read_calls
from edge_node.rendering import Renderer
from examples.errands.base import CHAT_TEMPLATE, RECIPE, call, corpus
from examples.errands.environment import Errands, errands, split_of
from examples.quickstart.tokenizer import save_tokenizer, train_tokenizer


def test_tasks_are_the_same_again_and_the_splits_share_no_text() -> None:
    world = Errands()
    tasks = world.tasks("held_out", count=100, seed=1)
    assert tasks == world.tasks("held_out", count=100, seed=1)
    assert tasks[:40] == world.tasks("held_out", count=40, seed=1)
    texts = {task.messages[0]["content"] for task in tasks}
    assert len(texts) == 100
    assert {split_of(text) for text in texts} == {"held_out"}


@pytest.mark.parametrize(
    ("acts", "reward"),
    [
        (["item"], 1.0), (["shelf"], 0.0), ([], 0.0), (["item", "item"], 0.0),
        (["shelf", "item"], 0.0),
    ],
)  # fmt: skip
def test_one_act_on_the_item_is_right(acts: list[str], reward: float) -> None:
    world = Errands()
    (task,) = world.tasks("train", count=1, seed=0)
    world.reset(**task.data)
    found = world.look_up(task.data["owner"])
    for name in acts:
        assert world.act(task.data["verb"], found[name]) == "done"
    assert world.get_reward() == reward
    with pytest.raises(LookupError, match="nobody has nothing here"):
        world.look_up("nobody")


def test_the_corpus_is_what_the_template_makes_of_an_episode(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    episodes = corpus(replace(RECIPE, examples=300))
    tokenizer = train_tokenizer(text for episode in episodes for text, _ in episode)
    save_tokenizer(tokenizer, tmp_path, template=CHAT_TEMPLATE, positions=RECIPE.positions)
    renderer = Renderer(AutoTokenizer.from_pretrained(tmp_path), [])
    schemas = tool_schemas(Errands())
    renderer.expect_tools(schemas)
    errand = next(errands(random.Random("errands corpus/0"), "train"))
    (prompt, _), (first, said), (told, _), *_ = episodes[0]
    messages = [{"role": "user", "content": errand.text}]
    assert renderer.prompt_ids(messages, schemas) == tokenizer.encode(prompt).ids
    assert said
    (look,) = read_calls(renderer.answer_text(tokenizer.encode(first).ids))
    assert (look.name, look.arguments) == ("look_up", {"owner": errand.owner})
    assert first == call("look_up", owner=errand.owner) + "</s>"
    world = Errands()
    world.reset(errand.owner, errand.verb, errand.found)
    result = {
        "role": "tool", "name": "look_up", "tool_call_id": "c",
        "content": json.dumps(world.look_up(errand.owner)),
    }  # fmt: skip
    assert renderer.after_calls_ids(messages, [result], schemas) == tokenizer.encode(told).ids
    longest = max(sum(len(tokenizer.encode(text).ids) for text, _ in one) for one in episodes)
    assert longest < 200
