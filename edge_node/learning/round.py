"""One round from plan to outbox: gathers what the plan names, trains, signs, hands over.

In: a RoundPlan and the node's stores. Out: the update's id; the update is on disk in the outbox. Importing this module
loads torch (through training).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from edge_node.base_model import read_base
from edge_node.environments import Task, load_environment
from edge_node.errors import SettingsError
from edge_node.experience import ExperienceStore
from edge_node.identity import Identity
from edge_node.learning.batches import Lesson
from edge_node.learning.records import RoundImpossible, RoundPlan
from edge_node.learning.training import TrainedRound, train_round
from edge_node.outbox import Outbox
from edge_node.releases.peft_directory import directory_rank
from edge_node.rendering import ChatFormat, Renderer, load_renderer
from edge_node.settings import EdgeSettings, EnvironmentSpec
from protos.lora import encode
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex, sign

DISTRIBUTION = "lorikeet-federated"
DEFAULT_MAX_TOKENS = 4096
"""Longest anchor where neither the settings nor the base model say."""


def run_round(
    plan: RoundPlan, settings: EdgeSettings, outbox: Outbox, workspace: Path, active: Callable[[], str | None]
) -> str:
    """Train `plan` (from its newest checkpoint) and leave the update in the outbox; returns the
    update id.

    Args:
        active: id of the release that the node serves now. A round whose update would supersede an earlier one is
            given up when the node has moved on: the earlier update has been or will be merged, central would set this
            one aside, and its experience goes into the next round all the same.

    Raises:
        SettingsError: no base model, or an environment cannot be loaded or its anchors not rendered.
        RoundImpossible: there is nothing to learn, or the start release is not on disk any more.
        RoundObsolete: see `active`.
    """
    known = outbox.of_round(plan.round_id)
    if known is not None:  # killed after the hand-over, before it was recorded
        return known.update_id
    identity = Identity.load(settings.data_dir)
    superseded = outbox.last_for_start(plan.release_id)
    trained = train_on_experience(
        plan,
        settings,
        release_directory(settings.data_dir, plan.release_id, plan.release_rank),
        workspace,
        obsolete=lambda: superseded is not None and active() != plan.release_id,
    )
    payload = encode(trained.tensors)
    manifest = UpdateManifest(
        node_id=identity.node_id,
        sequence=outbox.next_sequence(),
        base=identity.base,
        start=Start(
            release=plan.release_id, payload=plan.payload_digest, prefix_rank=plan.release_rank, dtype="float32"
        ),
        rank=trained.tensors.rank,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        supersedes=None if superseded is None else superseded.update_id,
        round_id=plan.round_id,
        experiences=int(trained.metrics["examples"]),
        metrics=trained.metrics,
        created_at=plan.created_at,
        software=f"{DISTRIBUTION} {version(DISTRIBUTION)}",
    ).to_bytes()
    return outbox.add(plan.round_id, manifest, sign(identity.key, manifest), payload)


def train_on_experience(
    plan: RoundPlan,
    settings: EdgeSettings,
    release: Path,
    workspace: Path,
    *,
    obsolete: Callable[[], bool] = lambda: False,
) -> TrainedRound:
    """The round's training alone: the node's examples up to the plan's cursor, anchors, and `release`'s directory."""
    base = read_base(settings)
    store = ExperienceStore(settings.data_dir / "experience.db")
    examples = store.examples(up_to=plan.cursor, limit=plan.max_examples)
    if not examples:
        raise RoundImpossible(
            "There is no corrected or verified answer that can be learnt from.",
            "Send corrections to POST /v1/feedback, and look at `usable` in its answers.",
        )
    return train_round(
        plan,
        base=base.path,
        modules=base.module_shapes,
        release=release if plan.release_rank else None,
        own=[
            Lesson(
                example.prompt_ids,
                example.target_ids,
                hard=example.source == "correction" and example.model.endswith(f"@{plan.label}"),
            )
            for example in examples
        ],
        anchors=anchor_lessons(settings, base.path, plan) if plan.batch_anchor else [],
        workspace=workspace,
        obsolete=obsolete,
    )


def anchor_lessons(settings: EdgeSettings, base: Path, plan: RoundPlan) -> list[Lesson]:
    """What the base could do, from the train splits of the anchor environments: `anchor_pool`
    examples in all.

    One that is longer than the model serves is left out; raises SettingsError when an environment
    has no other.
    """
    specs = [spec for spec in settings.environments if spec.anchor]
    if not specs:
        return []
    renderer = load_renderer(base, ChatFormat.read(settings.data_dir))
    limit = settings.serving.max_model_len or _max_positions(base)
    lessons: list[Lesson] = []
    for spec in specs:
        environment = load_environment(spec)
        tasks = environment.tasks("train", count=max(1, plan.anchor_pool // len(specs)), seed=plan.anchor_seed)
        made = [_anchor(renderer, spec, task, environment.reference_answer(task)) for task in tasks]
        fit = [lesson for lesson in made if len(lesson.prompt_ids) + len(lesson.target_ids) <= limit]
        if not fit:
            raise SettingsError(
                f"Environment {spec.name!r} is an anchor, and none of its {len(made)} train tasks fits into the {limit} "
                "tokens that the model serves. Correct the environment, or set anchor to false."
            )
        lessons += fit
    return lessons


def _anchor(renderer: Renderer, spec: EnvironmentSpec, task: Task, answer: str | None) -> Lesson:
    if answer is None:
        raise SettingsError(
            f"Environment {spec.name!r} is an anchor but knows no answer to its train task {task.id!r}; "
            "expected reference_answer to return one. Correct the environment, or set anchor to false."
        )
    try:
        return Lesson(renderer.prompt_ids(task.messages), renderer.answer_ids(answer))
    except SettingsError:
        raise
    except Exception as error:  # the template decides what it takes, and raises what it likes
        # Not its words, which may quote the task.
        raise SettingsError(
            f"Environment {spec.name!r} is an anchor, and the chat template refuses its train task {task.id!r} with "
            f"{type(error).__name__}. Correct the task's messages, or set anchor to false."
        ) from error


def _max_positions(base: Path) -> int:
    config = json.loads((base / "config.json").read_bytes())
    text = config.get("text_config") or config  # a language model inside a wrapper has its own
    return int(text.get("max_position_embeddings") or DEFAULT_MAX_TOKENS)


def release_directory(data_dir: Path, release_id: str, rank: int = 0) -> Path:
    """The PEFT directory of a release, which must be of that rank where one is given; raises
    RoundImpossible.
    """
    path = data_dir / "releases" / "versions" / release_id
    if not (path / "adapter_config.json").is_file():
        raise RoundImpossible(
            f"Release {release_id[:12]} is not in {path}, and the round starts from it.",
            "Nothing needs to be done: the next round starts from the release that is served then.",
        )
    if rank not in (0, found := directory_rank(path)):
        raise RoundImpossible(
            f"Release {release_id[:12]} is in {path} at rank {found}, and the round started from rank {rank}: "
            "EDGE_RELEASES__MAX_RANK was changed.",
            "Nothing needs to be done: the next round starts from the new rank.",
        )
    return path
