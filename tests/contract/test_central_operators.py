"""The operator's service on real grpc.aio servers: releases, where they come from, who may ask."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from central.errors import StorageError
from protos.fleet.v1 import fleet_pb2
from protos.operators.v1 import operators_pb2, operators_pb2_grpc
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    Central,
    Node,
    accept,
    encode_factors,
    make_candidate,
    refusal,
)


async def test_the_operator_sees_promotes_and_rolls_back(central: Central, node: Node) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    operator = central.operators
    promote = operators_pb2.PromoteReleaseRequest(release=release_id[:8], channel="canary")
    assert (await refusal(operator.PromoteRelease(promote, timeout=20)))[1] == "NOT_ACCEPTED"
    await accept(central, release_id)
    shown = (await operator.PromoteRelease(promote, timeout=20)).release
    assert (list(shown.channels), shown.verdict, shown.truncation_error) == (
        ["canary", "stable"],
        "fine",
        0.25,
    )
    update_id = node.manifest(encode_factors()).digest
    assert dict(shown.update_weights) == {update_id: 1.0}
    back = operators_pb2.PromoteReleaseRequest(release=node.genesis.digest, channel="stable")
    assert (await refusal(operator.PromoteRelease(back, timeout=20)))[1] == "BAD_ARGUMENT"

    rollback = operators_pb2.RollbackReleaseRequest(
        cohort="shared", updates=operators_pb2.ABANDONED_UPDATES_REQUEUE
    )
    done = await operator.RollbackRelease(rollback, timeout=20)
    assert (done.release.release_id, list(done.abandoned_release_ids)) == (
        node.genesis.digest,
        [release_id],
    )
    updates = (
        await operator.ListUpdates(operators_pb2.ListUpdatesRequest(cohort="shared"), timeout=20)
    ).updates
    assert [(update.update_id, update.state) for update in updates] == [
        (update_id, updates_pb2.UPDATE_STATE_WAITING)
    ]
    assert (await refusal(operator.RollbackRelease(rollback, timeout=20)))[1] == "BAD_ARGUMENT"
    unspecified = operators_pb2.RollbackReleaseRequest(cohort="shared")
    assert (await refusal(operator.RollbackRelease(unspecified, timeout=20)))[1] == "BAD_ARGUMENT"

    listed = (await operator.ListReleases(operators_pb2.ListReleasesRequest(), timeout=20)).releases
    assert [release.state for release in listed] == [
        operators_pb2.RELEASE_STATE_ACCEPTED,
        operators_pb2.RELEASE_STATE_ABANDONED,
    ]
    events = (
        await operator.ListEvents(operators_pb2.ListEventsRequest(after=2, limit=2), timeout=20)
    ).events
    assert [event.sequence for event in events] == [3, 4]
    unknown = operators_pb2.GetReleaseRequest(release="v9-00000000")
    assert (await refusal(operator.GetRelease(unknown, timeout=20)))[1] == "UNKNOWN_RELEASE"
    for cohort, uses in (("No Name", 1), ("new\n", 1), ("new", 0)):
        bad = operators_pb2.CreateTokenRequest(cohort=cohort, uses=uses, valid_s=60)
        assert (await refusal(operator.CreateToken(bad, timeout=20)))[1] == "BAD_ARGUMENT"
    with central.rooms.journal.read() as state:
        assert state.cohorts() == ["shared"]
    typo = operators_pb2.ListUpdatesRequest(cohort="shred")
    assert (await refusal(operator.ListUpdates(typo, timeout=20)))[1:] == (
        "UNKNOWN_COHORT",
        "Cohort 'shred' is not known. Expected one of: shared.",
    )
    unknown_node = operators_pb2.ListUpdatesRequest(node_id="nobody")
    assert (await refusal(operator.ListUpdates(unknown_node, timeout=20)))[1] == "UNKNOWN_NODE"
    assert (
        await refusal(
            operator.ListReleases(operators_pb2.ListReleasesRequest(cohort="x"), timeout=20)
        )
    )[1] == "UNKNOWN_COHORT"
    beyond = operators_pb2.ListEventsRequest(after=2**64 - 1)
    assert not (await operator.ListEvents(beyond, timeout=20)).events


async def test_the_operator_asks_where_a_release_comes_from_and_what_it_changed(
    central: Central, node: Node
) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    await accept(central, release_id)
    status = fleet_pb2.NodeStatus(serving_release_id=release_id)
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=status), timeout=20)
    explain = operators_pb2.ExplainReleaseRequest(release=release_id[:8])
    told = await central.operators.ExplainRelease(explain, timeout=20)
    assert [(part.node_id, part.weight) for part in told.contributions] == [(node.node_id, 1.0)]
    assert [(period.channel, period.by, period.until) for period in told.periods] == [
        ("stable", "gate", "")
    ]
    assert [serving.node_id for serving in told.serving] == [node.node_id]
    diff = operators_pb2.DiffReleasesRequest(release_a=node.genesis.label, release_b=release_id)
    change = await central.operators.DiffReleases(diff, timeout=20)
    assert [update.update_id for update in change.added] == list(told.release.update_weights)
    factors = harness.make_factors(9).modules[harness.Q_PROJ]
    assert [module.module for module in change.modules] == [harness.Q_PROJ]
    assert change.all_modules.norm_b == pytest.approx(
        factors.scale * np.linalg.norm(factors.B @ factors.A), rel=1e-5
    )
    unknown = operators_pb2.DiffReleasesRequest(release_a="v9-00000000", release_b=release_id)
    assert (await refusal(central.operators.DiffReleases(unknown, timeout=20)))[
        1
    ] == "UNKNOWN_RELEASE"
    assert (await refusal(operator_stub(node).ExplainRelease(explain, timeout=20)))[
        1
    ] == "NOT_OPERATOR"


def operator_stub(node: Node) -> operators_pb2_grpc.OperatorServiceStub:
    """The operator's service, asked with a node's certificate."""
    return operators_pb2_grpc.OperatorServiceStub(node.channel)


async def test_a_failing_disk_is_said_to_be_one(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("/secret/path is full")

    monkeypatch.setattr(central.rooms.journal, "events", fail)
    request = operators_pb2.ListEventsRequest()
    code, why, told = await refusal(central.operators.ListEvents(request, timeout=20))
    assert (code, why) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED")
    assert "secret" not in told
