"""Real vLLM nodes of a cohort that builds on shared: one on canary, one with short prefixes.

What a node serves is compared with a dense float64 oracle that knows only the base and the
increments that were uploaded: neither the merge nor the node's own files enter it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_node.identity import JoinToken
from examples.ports import free_port
from protos.base import read_base_model
from protos.lora import LoraTensors, encode
from protos.manifest import sha256_hex
from tests.contract.central_harness import Node, join
from tests.fakes.tiny_model import tiny_adapter, tiny_model
from tests.integration.composed_oracle import (
    Dense,
    Oracle,
    dense,
    distance,
    first_pairs,
    served,
    url_of,
)
from tests.integration.harness import Client, Program, is_ready, running, wait_for

RANK, MAX_RANK, UPDATE_RANK = 16, 4, 10
"""Ranks of a release, of the stable node's prefix of it, and of an update.

Two updates together do not fit into a release.
"""
SOAK_S = 3
TOLERANCE = 1e-4
"""Nats, mean of |served - oracle| over the most likely tokens of all prompts."""
APART = 0.1
"""Nats, by the same measure, that every other candidate for what is served must be away."""


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Program]:
    program = Program(
        "central.cli",
        {
            "CENTRAL_DATA_DIR": str(tmp_path / "central"),
            "CENTRAL_BASE__PATH": str(tiny_model()),
            "CENTRAL_LISTEN__PORT": str(free_port()),
            "CENTRAL_LISTEN__ENROLLMENT_PORT": str(free_port()),
            "CENTRAL_COHORTS__BUILDS_ON": json.dumps({"acme": "shared"}),
            "CENTRAL_CHANNELS__COHORTS": json.dumps({"acme": {"first": "canary"}}),
            "CENTRAL_MERGE__MIN_UPDATES": "1",
            "CENTRAL_MERGE__RANK": str(RANK),
            "CENTRAL_GATE__QUORUM": "0",  # the gate has tests of its own
        },
        tmp_path / "central.log",
    )
    with running(program, "serve"):
        wait_for("central", lambda: "central is ready" in program.log.read_text(), 60, tmp_path)
        yield program


@pytest.fixture
def nodes(central: Program, tmp_path: Path) -> Iterator[dict[str, Program]]:
    """By channel. The stable node's vLLM has no room for a whole release."""
    particular = {
        "canary": {"EDGE_RELEASES__CHANNEL": "canary", "EDGE_SERVING__MAX_LORA_RANK": str(RANK)},
        "stable": {"EDGE_RELEASES__MAX_RANK": str(MAX_RANK), "EDGE_SERVING__MAX_LORA_RANK": "8"},
    }
    with ExitStack() as stack:
        programs = {}
        for channel, settings in particular.items():
            programs[channel] = Program(
                "edge_node.cli",
                {
                    "EDGE_DATA_DIR": str(tmp_path / channel),
                    "EDGE_NODE_NAME": channel,
                    "EDGE_BASE__PATH": str(tiny_model()),
                    "EDGE_CENTRAL__ADDRESS": (
                        f"localhost:{central.settings['CENTRAL_LISTEN__PORT']}"
                    ),
                    "EDGE_CENTRAL__ENROLLMENT_ADDRESS": (
                        f"localhost:{central.settings['CENTRAL_LISTEN__ENROLLMENT_PORT']}"
                    ),
                    "EDGE_CENTRAL__JOIN_TOKEN": make_token(central, "acme"),
                    "EDGE_SERVING__PORT": str(free_port()),
                    # auto would halve it, and the tolerance with it
                    "EDGE_SERVING__DTYPE": "float32",
                    "EDGE_LEARNING__ENABLED": "false",
                    **settings,
                },
                tmp_path / f"{channel}.log",
            )
            stack.enter_context(running(programs[channel], "serve"))
        for channel, program in programs.items():
            wait_for(f"a ready {channel} node", partial(is_ready, url_of(program)), 400, tmp_path)
        yield programs


def make_token(central: Program, cohort: str) -> str:
    return str(central.json("tokens", "create", "--cohort", cohort)["token"])


def name(release: Mapping[str, Any]) -> str:
    return f"lorikeet@{release['version']}"


def upload(central: Program, cohort: str, update: LoraTensors) -> str:
    """Id of one update of a new site of the cohort."""

    async def run() -> str:
        token, payload = JoinToken.parse(make_token(central, cohort)), encode(update)
        site_name = f"site-{sha256_hex(payload)[:8]}"  # one name, one key
        key = ec.generate_private_key(ec.SECP256R1())
        address = f"localhost:{central.settings['CENTRAL_LISTEN__ENROLLMENT_PORT']}"
        answer = await join(
            address, site_name, token, key, base_digest=read_base_model(tiny_model()).digest
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        credentials = grpc.ssl_channel_credentials(token.ca_pem, pem, answer.certificate_pem)
        address = f"localhost:{central.settings['CENTRAL_LISTEN__PORT']}"
        async with grpc.aio.secure_channel(address, credentials) as channel:
            site = Node(answer.node_id, key, answer, channel)
            manifest = site.manifest(payload, rank=UPDATE_RANK)
            await site.upload(payload, manifest)
            return manifest.digest

    return asyncio.run(run())


def head(central: Program, cohort: str, channel: str) -> dict[str, Any]:
    """What the channel points at."""
    rows = central.json("releases", "list", "--cohort", cohort)
    (row,) = [row for row in rows if channel in row["channels"]]
    return dict(row)


@dataclass
class Story:
    """The parts, and what came of them so far.

    Releases are rows of `central releases list`, for acme.
    """

    central: Program
    nodes: dict[str, Program]
    clients: dict[str, Client]
    expected: dict[str, npt.NDArray[np.float64]]
    logs: Path
    genesis: dict[str, Any]

    def check(self, channel: str, release: dict[str, Any], what: str) -> None:
        """Clients of the channel's node came to this release, and it is `what`."""
        models, wanted = self.clients[channel].models, name(release)
        wait_for(f"{wanted} on {channel}", lambda: models and models[-1] == wanted, 60, self.logs)
        self.compare(self.nodes[channel], release, what)

    def compare(self, node: Program, release: dict[str, Any], what: str) -> None:
        """The node serves this release, and it is `what` and nothing else that we know of."""
        version, found = served(node)
        assert version == name(release)
        away = {other: distance(found, log_probs) for other, log_probs in self.expected.items()}
        print(url_of(node), version, {other: f"{nats:.2g}" for other, nats in away.items()})
        assert away.pop(what) < TOLERANCE, f"{what} is not what is served"
        assert min(away.values()) > APART, "two candidates for what is served cannot be told apart"

    def upload(
        self, cohort: str, update: LoraTensors, before: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """An update's id, and the release on acme's canary that follows `before` because of it."""
        update_id = upload(self.central, cohort, update)
        return update_id, self.next_canary(before)

    def next_canary(self, before: dict[str, Any]) -> dict[str, Any]:
        def seen() -> dict[str, Any] | None:
            row = head(self.central, "acme", "canary")
            return row if row["release_id"] != before["release_id"] else None

        return wait_for("a canary", seen, 60, self.logs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_canary_and_first_pairs_of_composed_releases(
    central: Program, nodes: dict[str, Program], tmp_path: Path
) -> None:
    clients = {channel: Client(url_of(node)) for channel, node in nodes.items()}
    genesis = head(central, "acme", "stable")
    mistake, shared, own = (
        tiny_adapter(seed, rank=UPDATE_RANK, strength=0.3) for seed in (1, 2, 3)
    )
    story = Story(
        central, nodes, clients, what_may_be_served(mistake, shared, own), tmp_path, genesis
    )
    for client in clients.values():
        client.start()
    for channel in nodes:
        story.check(channel, genesis, "base")
    bad = a_mistake_stays_on_canary_and_goes_back(story, mistake)
    first = what_shared_learnt_comes_by_canary_too(story, shared)
    update_id, composed = both_together_go_to_stable_and_back(story, own, first)
    again = a_served_canary_becomes_stable_by_itself(story, update_id, first)
    central.run("releases", "verify")
    no_answer_failed_or_mixed_versions(
        clients["canary"], [genesis, bad, genesis, first, composed, first, again]
    )
    no_answer_failed_or_mixed_versions(clients["stable"], [genesis, first, composed, first, again])
    assert clients["canary"].texts[name(again)] == clients["canary"].texts[name(composed)]
    a_node_that_gets_room_serves_whole_releases(story, again)
    assert central.stop() == 0


def what_may_be_served(
    mistake: LoraTensors, shared: LoraTensors, own: LoraTensors
) -> dict[str, npt.NDArray[np.float64]]:
    """The oracle's log-probabilities of everything that a node could serve, rightly or not."""
    products: dict[str, Dense] = {
        "base": {},
        "mistake": dense(mistake),
        "shared": dense(shared),
        "first pairs of shared": first_pairs(dense(shared), MAX_RANK),
        "own part": dense(own),
        "first pairs of own part": first_pairs(dense(own), MAX_RANK),
        "composed": first_pairs(dense(shared, own), RANK),
        "not truncated": dense(shared, own),
        "first pairs of composed": first_pairs(dense(shared, own), MAX_RANK),
    }
    oracle = Oracle()
    return {what: oracle.next_token(product) for what, product in products.items()}


def a_mistake_stays_on_canary_and_goes_back(story: Story, mistake: LoraTensors) -> dict[str, Any]:
    _, bad = story.upload("acme", mistake, story.genesis)
    story.check("canary", bad, "mistake")
    story.central.run(
        "releases", "rollback", "--cohort", "acme", "--channel", "canary", "--updates", "set-aside"
    )
    story.check("canary", story.genesis, "base")
    story.check("stable", story.genesis, "base")
    return bad


def what_shared_learnt_comes_by_canary_too(story: Story, shared: LoraTensors) -> dict[str, Any]:
    _, first = story.upload("shared", shared, story.genesis)
    assert first["builds_on_id"] == head(story.central, "shared", "stable")["release_id"]
    story.check("canary", first, "shared")
    story.check("stable", story.genesis, "base")
    story.central.run("releases", "promote", first["version"], "--channel", "stable")
    story.check("stable", first, "first pairs of shared")
    return first


def both_together_go_to_stable_and_back(
    story: Story, own: LoraTensors, first: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    update_id, composed = story.upload("acme", own, first)
    assert (composed["builds_on_id"], composed["parent_id"]) == (
        first["builds_on_id"],
        first["release_id"],
    )
    assert list(composed["update_weights"]) == [update_id]
    story.check("canary", composed, "composed")
    story.check("stable", first, "first pairs of shared")
    story.central.run("releases", "promote", composed["version"], "--channel", "stable")
    story.check("stable", composed, "first pairs of composed")
    story.check("canary", composed, "composed")
    story.central.run("releases", "rollback", "--cohort", "acme", "--updates", "set-aside")
    story.check("stable", first, "first pairs of shared")
    story.check("canary", first, "shared")
    return update_id, composed


def a_served_canary_becomes_stable_by_itself(
    story: Story, update_id: str, first: dict[str, Any]
) -> dict[str, Any]:
    """Central is away meanwhile and comes back with another policy.

    What the real node reports then decides.
    """
    central = story.central
    assert central.stop() == 0
    channels = {"acme": {"first": "canary", "soak_s": SOAK_S}}
    central.settings = {**central.settings, "CENTRAL_CHANNELS__COHORTS": json.dumps(channels)}
    central.start("serve")
    wait_for(
        "central again",
        lambda: central.log.read_text().count("central is ready") == 2,
        60,
        story.logs,
    )
    central.run("updates", "requeue", update_id)
    again = story.next_canary(first)
    story.check("canary", again, "composed")
    story.check("stable", again, "first pairs of composed")
    events = [
        e
        for e in central.json("events")
        if (e["kind"], e["subject"]) == ("promoted", again["release_id"])
    ]
    assert [(e["body"]["channel"], e["body"]["by"]) for e in events] == [
        ("canary", "gate"),
        ("stable", "central"),
    ]
    return again


def no_answer_failed_or_mixed_versions(client: Client, releases: list[dict[str, Any]]) -> None:
    """The client met exactly these releases, one after the other.

    Every text of one release was the same, and no other release gave it.
    """
    client.done.set()
    client.join(10)
    assert client.failures == []
    assert [model for model, _ in groupby(client.models)] == [name(release) for release in releases]
    assert {len(texts) for texts in client.texts.values()} == {1}
    # The last one holds what the composed one before it held.
    assert len(set.union(*client.texts.values())) == len(client.texts) - 1


def a_node_that_gets_room_serves_whole_releases(story: Story, release: dict[str, Any]) -> None:
    """From the payload beside the first pairs."""
    for node in story.nodes.values():
        assert node.stop() == 0
    roomy = {"EDGE_RELEASES__MAX_RANK": str(RANK), "EDGE_SERVING__MAX_LORA_RANK": str(RANK)}
    node = replace(story.nodes["stable"], settings={**story.nodes["stable"].settings, **roomy})
    with running(node, "serve"):
        wait_for("a ready node again", partial(is_ready, url_of(node)), 300, story.logs)
        story.compare(node, release, "composed")
        assert node.stop() == 0
