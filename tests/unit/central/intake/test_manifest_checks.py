"""What central asks of a manifest before the payload comes: each refusal, and the last value that
still passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.errors import Reason, Refused
from central.intake.checks import check_manifest, check_signature
from central.journal import Journal, NodeRecord, State
from central.settings import LimitSettings
from protos.manifest import Payload, UpdateManifest, sign
from tests.unit.central import builders as make

KEY = ec.generate_private_key(ec.SECP256R1())
NODE_ID = "a-00000000"
START = make.make_release(rank=8)
OTHERS = make.make_release("acme")
LIMITS = LimitSettings(max_rank=16, max_update_bytes=200)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with closing(Journal(f"sqlite:///{tmp_path / 'journal.db'}")) as journal:
        journal.append(make.cohort_created(START), make.cohort_created(OTHERS))
        with journal.read() as state:
            yield state


def make_node(key: ec.EllipticCurvePrivateKey = KEY) -> NodeRecord:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return NodeRecord(NODE_ID, "a", "shared", "token", pem.decode(), make.BASE, "", make.AT)


@contextmanager
def refused(
    reason: Reason, status: grpc.StatusCode = INVALID, text: str | None = None
) -> Iterator[None]:
    with pytest.raises(Refused, match=text) as caught:
        yield
    assert (caught.value.reason, caught.value.status) == (reason, status)


def update(**fields: object) -> UpdateManifest:
    return make.make_update(START, NODE_ID).model_copy(update=fields)


def start(**fields: object) -> dict[str, object]:
    return {"start": update().start.model_copy(update=fields)}


def sized(size: int) -> dict[str, object]:
    return {"payload": Payload(digest_sha256=make.digest_of("payload"), size_bytes=size)}


@pytest.mark.parametrize(
    "fields", [{}, {"rank": 16}, sized(200), start(prefix_rank=0), start(prefix_rank=8)]
)
def test_what_is_within_every_limit_passes(state: State, fields: dict[str, object]) -> None:
    check_manifest(state, make_node(), update(**fields), make.BASE, LIMITS)


@pytest.mark.parametrize(
    ("fields", "reason", "status", "text"),
    [
        ({"base": "0" * 64}, Reason.OTHER_BASE, PRECONDITION, "central's base is"),
        (start(release="0" * 64), Reason.UNKNOWN_START, PRECONDITION, "not known in cohort 'sh"),
        (start(release=OTHERS.digest), Reason.UNKNOWN_START, PRECONDITION, "not known in cohort"),
        (start(payload="0" * 64), Reason.UNKNOWN_START, PRECONDITION, "Download the release"),
        (start(prefix_rank=9), Reason.UNKNOWN_START, PRECONDITION, "with prefix rank 9"),
        ({"rank": 17}, Reason.RANK_TOO_LARGE, INVALID, "rank 17; central admits at most 16"),
        (sized(201), Reason.TOO_LARGE, INVALID, "201 bytes; central admits at most 200"),
        ({"sections": ["b", "c"]}, Reason.UNKNOWN_SECTION, INVALID, "section 'b'"),
    ],
)
def test_what_is_not_is_refused(
    state: State, fields: dict[str, object], reason: Reason, status: grpc.StatusCode, text: str
) -> None:
    with refused(reason, status, text):
        check_manifest(state, make_node(), update(**fields), make.BASE, LIMITS)


def test_the_signed_manifest_is_returned() -> None:
    data = update().to_bytes()
    assert check_signature(make_node(), data, sign(KEY, data), len(data)) == update()


def test_a_manifest_longer_than_central_reads_is_refused() -> None:
    data = update().to_bytes()
    with refused(Reason.TOO_LARGE, text=f"has {len(data)} bytes; .* at most {len(data) - 1}"):
        check_signature(make_node(), data, sign(KEY, data), len(data) - 1)


def test_another_keys_signature_is_refused() -> None:
    data, other = update().to_bytes(), ec.generate_private_key(ec.SECP256R1())
    with refused(Reason.BAD_SIGNATURE, text=f"the key that node {NODE_ID} enrolled"):
        check_signature(make_node(), data, sign(other, data), len(data))
    with refused(Reason.BAD_SIGNATURE):
        check_signature(make_node(), data + b" ", sign(KEY, data), len(data) + 1)


def test_signed_bytes_that_are_no_manifest_are_refused() -> None:
    with refused(Reason.BAD_MANIFEST, text="Expected protos.manifest.UpdateManifest"):
        check_signature(make_node(), b"{}", sign(KEY, b"{}"), 2)


def test_a_manifest_that_speaks_for_another_node_is_refused() -> None:
    data = make.make_update(START, "b-11111111").to_bytes()
    with refused(Reason.BAD_MANIFEST, text=f"for node b-11111111; .* of {NODE_ID}"):
        check_signature(make_node(), data, sign(KEY, data), len(data))
