"""One round from plan to outbox: gathers what the plan names, trains, signs, hands over.

In: a RoundPlan and the node's stores. Out: the update's id; the update is on disk in the outbox.
Importing this module loads torch (through training).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from edge_node.base_model import longest_context, read_base
from edge_node.environments import Environment, EnvironmentProcess, Task, by_weight
from edge_node.errors import SettingsError
from edge_node.experience import ExperienceStore, Pair, Thumb, open_experience
from edge_node.identity import Identity
from edge_node.learning.anchors import Anchors, read_anchors
from edge_node.learning.batches import Lesson
from edge_node.learning.gate import pass_local_gate
from edge_node.learning.own import keep_own
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policy import Method
from edge_node.learning.records import RoundImpossible
from edge_node.learning.steering import UNSTEERED, Steering
from edge_node.learning.training import RoundObsolete, TrainedRound, train_round
from edge_node.learning.workplace import Workplace, find_workplace
from edge_node.outbox import Outbox, OutboxEntry
from edge_node.releases.peft_directory import directory_rank
from edge_node.rendering import ChatFormat, Renderer, load_renderer
from edge_node.settings import EdgeSettings, EnvironmentSpec
from protos.base import BaseModelInfo
from protos.lora import decode, encode, relative_error
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex, sign

DISTRIBUTION = "lorikeet-federated"
T = TypeVar("T")


def run_round(
    plan: RoundPlan,
    settings: EdgeSettings,
    outbox: Outbox,
    workspace: Path,
    active: Callable[[], str | None],
    beat: Callable[[], None] = lambda: None,
    steering: Steering = UNSTEERED,
) -> str:
    """Train `plan`, from its newest checkpoint, into the outbox; returns the update's id.

    Args:
        active: id of the release that the node serves now. A round whose update would supersede an
            earlier one is given up when the node has moved on. Central merges the earlier update
            and would set this one aside; the next round learns from the experience all the same.
        beat: called at each stage of the round, and in each layer of a training step.
        steering: asked and told between steps, and asked before the update is handed over.

    Raises:
        SettingsError: no base model, modules or a GPU that are not there, or unusable anchors.
        EnvironmentFault: an anchor's environment does not work.
        RoundImpossible: there is nothing to learn, or the start release is not on disk any more.
        NoGain, ServingError: as `train_on_verifiers`, or the local gate says so (`gate.py`).
        RoundObsolete: see `active`; or an interaction was deleted since the round was planned.
        RoundCancelled, RoundPaused: `steering` said so.
    """
    known = outbox.of_round(plan.round_id)
    if known is not None:  # killed after the hand-over, before it was recorded
        return known.update_id
    identity = Identity.load(settings.data_dir)
    superseded = outbox.last_for_start(plan.release_id)
    release = release_directory(settings.data_dir, plan.release_id, plan.release_rank)
    place = find_workplace(
        plan,
        settings,
        release,
        workspace,
        obsolete=lambda: superseded is not None and active() != plan.release_id,
        beat=beat,
        steering=steering,
    )
    trained = TRAIN.get(plan.method, train_on_feedback)(plan, settings, place)
    if plan.takes_experience:
        place = or_deleted(open_experience(settings), plan, place, "before the local gate")
    judged = pass_local_gate(plan, settings, place, trained.tensors)
    # Of a grpo round `held_out_*` are the scores that it had to gain in.
    trained = replace(trained, metrics=judged | trained.metrics)
    with steering.handing_over():
        if plan.takes_experience:
            store = open_experience(settings)
            expect_none_deleted(store, plan, "before it was handed over")
        update_id = _hand_over(plan, identity, outbox, superseded, trained)
    # Not before: of a round that is cancelled or dropped after a crash, nothing may be served.
    keep_own(settings, plan, release, trained.tensors, trained.metrics)
    return update_id


def _hand_over(
    plan: RoundPlan,
    identity: Identity,
    outbox: Outbox,
    superseded: OutboxEntry | None,
    trained: TrainedRound,
) -> str:
    payload = encode(trained.tensors, plan.encoding)
    manifest = UpdateManifest(
        node_id=identity.node_id,
        sequence=outbox.next_sequence(),
        base=identity.base,
        start=Start(
            release=plan.release_id,
            payload=plan.payload_digest,
            prefix_rank=plan.release_rank,
            dtype="float32",
        ),
        rank=trained.tensors.rank,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        encoding=plan.encoding,
        encoding_error=relative_error(decode(payload), trained.tensors),
        supersedes=None if superseded is None else superseded.update_id,
        round_id=plan.round_id,
        experiences=int(trained.metrics["examples"]),
        metrics=trained.metrics,
        created_at=plan.created_at,
        software=f"{DISTRIBUTION} {version(DISTRIBUTION)}",
    ).to_bytes()
    return outbox.add(plan.round_id, manifest, sign(identity.key, manifest), payload)


def _train_on_verifiers(*args: Any) -> TrainedRound:
    # TRL's GRPO imports vLLM, for ten seconds: only where a round needs it.
    from edge_node.learning.exploration import train_on_verifiers

    return train_on_verifiers(*args)


def train_on_experience(plan: RoundPlan, settings: EdgeSettings, place: Workplace) -> TrainedRound:
    """Only trains: on examples up to the plan's cursor and anchors."""
    store = open_experience(settings)
    place = or_deleted(store, plan, place)
    own = own_lessons(store, plan)
    if not own:
        raise RoundImpossible(
            "There is no corrected or verified answer that can be learnt from.",
            "Send corrections to POST /v1/feedback, and look at `usable` in its answers.",
        )
    anchors = training_anchors(settings, read_base(settings), plan)
    place.beat()
    if plan.distil is None:
        return train_round(plan, place, own=own, anchors=anchors)
    from edge_node.learning.distilling import train_distilled  # TRL's experimental trainer

    limit = longest_context(settings, place.base)
    return train_distilled(plan, place, own=own, anchors=anchors, limit=limit)


def train_on_feedback(plan: RoundPlan, settings: EdgeSettings, place: Workplace) -> TrainedRound:
    """As `train_on_experience`, on the preferences, scored groups or thumbs up to the cursor."""
    store = open_experience(settings)
    known = {"up_to": plan.cursor, "limit": plan.max_examples}
    place = or_deleted(store, plan, place)
    if plan.method == "scored":
        from edge_node.learning.scored import train_scored  # TRL's GRPO imports vLLM

        model = f"{settings.serving.alias}@{plan.label}"
        groups = _expect_some(store.groups(model=model, **known))
        return train_scored(plan, place, groups=groups)
    from edge_node.learning.comparing import train_compared

    compared: Sequence[Pair] | Sequence[Thumb]
    if plan.method == "dpo":
        compared = _expect_some(store.pairs(**known))
    else:
        compared = store.thumbs(**known)
        for liked in (True, False):
            _expect_some([thumb for thumb in compared if thumb.liked is liked])
    anchors = training_anchors(settings, read_base(settings), plan)
    place.beat()
    return train_compared(plan, place, compared=compared, anchors=anchors)


TRAIN: dict[Method, Callable[..., TrainedRound]] = {
    "sft": train_on_experience,
    "grpo": _train_on_verifiers,
}
"""Rounds of the other methods learn from feedback."""


def or_deleted(
    store: ExperienceStore, plan: RoundPlan, place: Workplace, when: str = "before its first step"
) -> Workplace:
    """`place`, whose round is also obsolete when what the plan knew was deleted since.

    It must not be learnt, and a checkpoint may hold it. Raises RoundObsolete, which says `when`, if
    one was already.
    """
    expect_none_deleted(store, plan, when)
    return replace(
        place,
        obsolete=lambda: store.deleted(up_to=plan.known_up_to) != plan.deleted or place.obsolete(),
    )


def expect_none_deleted(store: ExperienceStore, plan: RoundPlan, when: str) -> None:
    """Raises RoundObsolete, which says `when`."""
    if store.deleted(up_to=plan.known_up_to) != plan.deleted:
        raise RoundObsolete(when)


def _expect_some(found: list[T]) -> list[T]:
    if not found:
        raise RoundImpossible(
            "The feedback that the round was planned on is not there any more.",
            "Nothing needs to be done: the next round starts when there is enough of it.",
        )
    return found


def own_lessons(store: ExperienceStore, plan: RoundPlan) -> list[Lesson]:
    """The newest `max_examples` of the node's examples, and those of earlier releases that the plan
    draws; one lesson each. Empty when there are none.
    """
    newest = store.examples(up_to=plan.cursor, limit=plan.max_examples)
    drawn = store.replay(
        up_to=plan.cursor,
        but=f"@{plan.label}",
        count=plan.batch_replay * plan.steps,
        seed=plan.seed,
    )
    known, replayed = (
        {example.feedback_id for example in examples} for examples in (newest, drawn)
    )
    return [
        Lesson(
            example.prompt_ids,
            example.target_ids,
            hard=example.source == "correction" and example.model.endswith(f"@{plan.label}"),
            replayed=example.feedback_id in replayed,
        )
        for example in newest
    ] + [
        Lesson(example.prompt_ids, example.target_ids, recent=False, replayed=True)
        for example in drawn
        if example.feedback_id not in known
    ]


def training_anchors(
    settings: EdgeSettings, base: BaseModelInfo, plan: RoundPlan
) -> list[Lesson] | Anchors:
    """What supervised steps learn beside own examples: the base's own samples, if the plan names
    any, else examples of anchor environments.

    Raises RoundImpossible when the samples are others by now, SettingsError when they are damaged,
    and as `anchor_lessons`.
    """
    if plan.anchors is None:
        return anchor_lessons(settings, base.path, plan) if plan.batch_anchor else []
    path = settings.learning.anchors
    anchors = None if path is None else read_anchors(path, base.digest)
    if anchors is None or anchors.digest != plan.anchors:
        raise RoundImpossible(
            f"The round was begun with the anchors {plan.anchors[:12]}; now EDGE_LEARNING__ANCHORS "
            f"has {'none' if anchors is None else anchors.digest[:12]}.",
            "Nothing needs to be done: the next round takes the anchors that are set then.",
        )
    return anchors


def anchor_lessons(settings: EdgeSettings, base: Path, plan: RoundPlan) -> list[Lesson]:
    """`anchor_pool` examples of what the base could do, from the anchors' train splits.

    Anchors of texts are only measured. An example that is longer than the model serves is left out;
    raises SettingsError when an environment has no other, EnvironmentFault when it does not work.
    """
    specs = [spec for spec in settings.environments if spec.anchor]
    with ExitStack() as held:
        loaded = [
            (spec, held.enter_context(EnvironmentProcess(spec)).environment()) for spec in specs
        ]
        anchors = [(spec, made) for spec, made in loaded if isinstance(made, Environment)]
        count = max(1, plan.anchor_pool // max(1, len(anchors)))
        known = [(spec, *_known(made, count, plan.anchor_seed)) for spec, made in anchors]
    if not known:
        return []
    renderer = load_renderer(base, ChatFormat.read(settings.data_dir))
    limit = longest_context(settings, base)
    lessons: list[Lesson] = []
    for spec, tasks, answers in known:
        made = [
            _anchor(renderer, spec, task, answer)
            for task, answer in zip(tasks, answers, strict=True)
        ]
        fit = [
            lesson for lesson in made if len(lesson.prompt_ids) + len(lesson.target_ids) <= limit
        ]
        if not fit:
            raise SettingsError(
                f"Environment {spec.name!r} is an anchor, and none of its {len(made)} train tasks "
                f"fits into the {limit} tokens that the model serves. Correct the environment, or "
                "set anchor to false."
            )
        lessons += fit
    return lessons


def _known(
    environment: Environment, count: int, seed: int
) -> tuple[Sequence[Task], list[str | None]]:
    """Train tasks and the answers to them."""
    tasks = environment.tasks("train", count=count, seed=seed)
    tasks = by_weight(tasks, [task.weight for task in tasks], count, seed)
    return tasks, [environment.reference_answer(task) for task in tasks]


def _anchor(renderer: Renderer, spec: EnvironmentSpec, task: Task, answer: str | None) -> Lesson:
    if answer is None:
        raise SettingsError(
            f"Environment {spec.name!r} is an anchor but knows no answer to its train task "
            f"{task.id!r}; expected reference_answer to return one. Correct the environment, or "
            "set anchor to false."
        )
    try:
        return Lesson(renderer.prompt_ids(task.messages), renderer.answer_ids(answer))
    except SettingsError:
        raise
    except Exception as error:  # the template decides what it takes, and raises what it likes
        # Not its words, which may quote the task.
        raise SettingsError(
            f"Environment {spec.name!r} is an anchor, and the chat template refuses its train "
            f"task {task.id!r} with {type(error).__name__}. Correct the task's messages, or set "
            "anchor to false."
        ) from error


def release_directory(data_dir: Path, release_id: str, rank: int = 0) -> Path:
    """The PEFT directory of a release, of rank `rank` if given; raises RoundImpossible."""
    path = data_dir / "releases" / "versions" / release_id
    if not (path / "adapter_config.json").is_file():
        raise RoundImpossible(
            f"Release {release_id[:12]} is not in {path}, and the round starts from it.",
            "Nothing needs to be done: the next round starts from the release that is served then.",
        )
    if rank not in (0, found := directory_rank(path)):
        raise RoundImpossible(
            f"Release {release_id[:12]} is in {path} at rank {found}, and the round started from "
            f"rank {rank}: EDGE_RELEASES__MAX_RANK was changed.",
            "Nothing needs to be done: the next round starts from the new rank.",
        )
    return path
