"""Orders to forget as lines for people.

In: messages. Out: lines without line breaks; the caller removes control characters.
"""

from __future__ import annotations

from collections.abc import Iterator

from central.operators.client import plain
from protos.operators.v1 import operators_pb2
from protos.updates.v1 import updates_pb2


def proposal(order: operators_pb2.ForgetOrder) -> Iterator[str]:
    """`central forget`: what is or would be done."""
    whose = f"node {order.node_id}" if order.node_id else "one update"
    word = (
        "would be forgotten"
        if order.state == operators_pb2.FORGET_STATE_PROPOSED
        else "are to be forgotten"
    )
    yield (
        f"{whose} of {order.cohort}: {len(order.in_release) + len(order.unreleased)} updates {word}"
    )
    for update in order.unreleased:
        yield (
            f"  {update.update_id[:12]} from {update.node_id}: in no release that stable stands "
            "on; with the order itself"
        )
    for update in order.in_release:
        yield (
            f"  {update.update_id[:12]} from {update.node_id}: in the stable release; with a new "
            "release without it"
        )
    yield f"how: {order.exactness}"
    if order.in_release:
        who = (
            f"released whatever the gate finds, as {order.by} says"
            if order.accept_loss
            else "the gate decides on it"
        )
        yield (
            f"the new release: {who}; what others learnt from a release that held it is not taken "
            "out"
        )
    for cohort in order.composed_cohorts:
        yield (
            f"{cohort} builds on a release that holds it: it is composed anew, and holds it until "
            "its gate accepts that"
        )
    if order.holders:
        yield f"can no longer be promoted or returned to afterwards: {', '.join(order.holders)}"


def cancelled(order: operators_pb2.ForgetOrder) -> Iterator[str]:
    """`central forget --cancel`."""
    yield (
        f"order {order.order_id[:8]} is {order.verdict}: what was merged is still there "
        f"({len(order.in_release)})"
    )
    for update in order.unreleased:
        if update.state == updates_pb2.UPDATE_STATE_FORGOTTEN:
            yield (
                f"  {update.update_id[:12]} from {update.node_id} was in no release; it was "
                "forgotten with the order and stays so"
            )


def progress(order: operators_pb2.ForgetOrder) -> str:
    """Where an order stands, in one line."""
    name = f"order {order.order_id[:8]}"
    held_up = f"; it waits for {order.waits_for}" if order.waits_for else ""
    if order.state == operators_pb2.FORGET_STATE_ORDERED:
        return f"{name} is planned with the cohort's next merge{held_up}"
    if order.state == operators_pb2.FORGET_STATE_PLANNED:
        made = (
            f"{order.candidate} is made and evaluated"
            if order.candidate
            else "the release without it is being made"
        )
        return f"{name}: {made}{held_up}"
    if order.state == operators_pb2.FORGET_STATE_DONE:
        return (
            f"{name} is "
            f"done{f': {order.candidate} is released. {order.verdict}' if order.candidate else ''}"
        )
    return f"{name} {plain(order)['state']}: {order.verdict}"
