"""How far a merge has come, as an operator is told."""

from __future__ import annotations

from central.merging.progress import shown
from protos.operators.v1 import operators_pb2
from tests.contract.central_harness import Central


async def test_an_operator_sees_the_merges_of_a_cohort_under_way(central: Central) -> None:
    for cohort in ("shared", "acme"):  # a token makes its cohort
        order = operators_pb2.CreateTokenRequest(cohort=cohort, uses=1, valid_s=3600)
        await central.operators.CreateToken(order, timeout=20)

    async def listed(cohort: str) -> list[tuple[str, str]]:
        request = operators_pb2.ListReleasesRequest(cohort=cohort)
        answer = await central.operators.ListReleases(request, timeout=20)
        return [(merge.cohort, merge.progress) for merge in answer.merging]

    with shown("shared", payloads=4), shown("acme", payloads=9):
        assert await listed("shared") == [("shared", "0 of 4 payloads read")]
        assert len(await listed("")) == 2
    assert await listed("") == []
