"""Keeps a round's adapter on this node, where its local gate found it better than its start.

In: a trained round whose update is in the outbox. Out: a PEFT directory of release and
increment side by side, and the record that the supervisor serves it from (releases/own.py).
Guarantees: the directory is whole before the record names it; a full disk or a rank that vLLM would
refuse costs this adapter, not the round.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from edge_node.base_model import read_base
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policies import read_release, side_by_side
from edge_node.problems import Problems
from edge_node.releases.own import ROOM, Own, expect_rank, own_folder, write_own
from edge_node.releases.peft_directory import peft_files
from edge_node.releases.trouble import next_step, words
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors


def keep_own(
    settings: EdgeSettings, plan: RoundPlan, release: Path, tensors: LoraTensors,
    metrics: dict[str, float],
) -> None:  # fmt: skip
    """`release`: the start's PEFT directory. Nothing is kept where no policy would serve it."""
    start, policy = metrics.get("held_out_start"), metrics.get("held_out_policy")
    wanted = settings.releases.may_serve_own and start is not None and policy is not None
    if not wanted or policy <= start:  # type: ignore[operator]
        return
    problems = Problems(settings.data_dir)
    folder = own_folder(settings.data_dir) / plan.round_id
    try:
        sum_of_both = side_by_side(read_release(release), tensors)
        expect_rank(sum_of_both.rank, settings.serving.max_lora_rank)
        _write(folder, peft_files(sum_of_both, read_base(settings).module_shapes))
        own = Own(
            round_id=plan.round_id, start_release=plan.release_id, path=folder,
            tasks=metrics["held_out_tasks"], start=start, policy=policy,
        )  # fmt: skip
        write_own(settings.data_dir, own)
    except Exception as error:  # supervision: the round has sent its update
        text = f"The adapter of round {plan.round_id} is not kept on this node: {words(error)}"
        problems.report(ROOM, text, next_step(error))
        return
    logging.getLogger(__name__).info("own adapter kept", extra={"round_id": plan.round_id})


def _write(folder: Path, files: dict[str, bytes]) -> None:
    if folder.is_dir():  # of a learner that was killed after it; a version is never replaced
        return
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.rename(folder)
