"""A file of a node that is damaged is a problem in `edge-node status`; the rest is still said."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from edge_node.doctor import node_status
from edge_node.experience import ExperienceStore
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings

V1 = "lorikeet@v1-aaaaaaaa"
DAMAGES = {
    "truncated": b'{"release_id": "ab',
    "empty": b"",
    "not JSON": b"\xff\x00no",
    "another type": b"[]",
    "wrong types": b'{"release_id": 5, "quarantine": {}, "node_id": [], "cohort": 1, "base": 2}',
    "without fields": b"{}",
    "nested too deeply": b"[" * 200_000,
    "half a surrogate pair": (
        rb'{"release_id": "\ud800", "quarantine": "\ud800", "node_id": "\ud800", "cohort": "a", '
        rb'"base": "b"}'
    ),
}
SURROGATE = r'{"room": "learning", "text": "\ud800", "next_step": "", "since": ""}'
FILES = {
    "releases/active.json": "releases",
    "releases/standing.json": "quarantine",
    "identity/identity.json": "identity",
    "identity/node.pem": "identity",
    "identity/node.key": "identity",
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
@pytest.mark.parametrize("file", sorted(FILES))
async def test_a_damaged_file_is_a_problem_of_a_node_that_serves(
    running: EdgeSettings, file: str, damage: str
) -> None:
    path = running.data_dir / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(DAMAGES[damage])
    status = json.loads(json.dumps(await node_status(running)))
    assert (status["ready"], status["serving"]) == (True, V1)
    (problem,) = [each for each in status["problems"] if each["room"] == FILES[file]]
    assert "cannot be read" in problem["text"]
    assert problem["next_step"]


@pytest.mark.parametrize("file", ["experience.db", "outbox/outbox.db"])
@pytest.mark.parametrize("kept", [0, 50])
async def test_a_damaged_store_is_a_problem(running: EdgeSettings, file: str, kept: int) -> None:
    ExperienceStore(running.data_dir / "experience.db").close()
    Outbox(running.data_dir / "outbox", "auto")
    path = running.data_dir / file
    content = path.read_bytes()
    path.write_bytes(content[:kept] + b"\xff" * max(0, len(content) - kept))
    status = await node_status(running)
    assert status["ready"]
    assert [each["room"] for each in status["problems"]] == [Path(file).stem]


async def test_a_damaged_problem_hides_no_other(running: EdgeSettings) -> None:
    Problems(running.data_dir).report("uploads", "It waits.", "Look.")
    for damage in ("{", "[" * 200_000, SURROGATE):
        (running.data_dir / "problems" / "learning.json").write_text(damage)
        assert [each["room"] for each in (await node_status(running))["problems"]] == ["uploads"]


async def test_a_certificate_that_names_no_node_is_a_problem(running: EdgeSettings) -> None:
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    pem = made.sign(key, SHA256()).public_bytes(Encoding.PEM)
    (running.data_dir / "identity" / "node.pem").write_bytes(pem)
    status = await node_status(running)
    assert (status["ready"], status["node_id"]) == (True, None)
    (problem,) = status["problems"]
    assert problem["room"] == "identity"
    assert "node.pem has no common name" in problem["text"]


async def test_a_base_that_is_gone_is_a_problem(running: EdgeSettings) -> None:
    assert running.base.path is not None
    (running.base.path / "config.json").unlink()
    status = await node_status(running)
    assert (status["ready"], status["node_id"] is not None) == (True, True)
    assert [each["room"] for each in status["problems"]] == ["releases"]
