"""The node's ClientApp with virtual nodes, each with a small experience store of its own.

The store is made when the node is first asked. A virtual node serves nothing, so the token ids of
its prompts are rendered here.
"""

from __future__ import annotations

from flwr.app import Context

from edge_node.environments import Environment
from edge_node.environments.loader import load_environment
from edge_node.experience import Feedback, Interaction, open_experience
from edge_node.federation.client_app import make_client_app
from edge_node.rendering import load_renderer
from edge_node.settings import EdgeSettings
from examples.simulation.config import SimulationConfig

WRONG = "I do not know."
MAX_TOKENS = 256
"""Context of the tiny base model."""


def settings_for(context: Context) -> EdgeSettings:
    """Settings of the virtual node with this context, and its store."""
    config = SimulationConfig.read(context.run_config)
    partition = int(context.node_config["partition-id"])
    settings = config.node(partition)
    remember(settings, config.examples, seed=1 + partition)
    return settings


def remember(settings: EdgeSettings, examples: int, seed: int) -> None:
    """Fill the node's store: tasks of its own environment, each answered wrongly and corrected."""
    assert settings.base.path is not None
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = open_experience(settings)
    try:
        if store.counts().examples >= examples:
            return
        environment = load_environment(settings.environments[0])
        assert isinstance(environment, Environment), "the simulation's own has tasks"
        tasks = environment.tasks("train", count=examples, seed=seed)
        renderer = load_renderer(settings.base.path)
        interactions = [
            Interaction(
                id=task.id,
                created_at="2026-11-22T00:00:00Z",
                model=f"{settings.serving.alias}@v0",
                messages=list(task.messages),
                answer=WRONG,
                finish_reason="stop",
                endpoint="/v1/chat/completions",
                prompt_ids=tuple(renderer.prompt_ids(task.messages)),
                answer_ids=tuple(renderer.answer_ids(WRONG)),
            )
            for task in tasks
        ]
        store.add_interactions(interactions)
        for task in tasks:
            outcome = environment.verify(task, WRONG)
            right = outcome.correction
            ids = tuple(renderer.answer_ids(right)) if right is not None else ()
            feedback = Feedback(task.id, score=outcome.score, correction=right, correction_ids=ids)
            store.add_feedback(feedback, max_tokens=MAX_TOKENS)
    finally:
        store.close()


app = make_client_app(settings_for)
