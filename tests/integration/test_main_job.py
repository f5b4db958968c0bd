"""The main job on real parts, once around: from enrolment to hot load and rollback."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from openai import OpenAI

from tests.fakes.otlp import Collector
from tests.fakes.word_environment import NextWord
from tests.integration.harness import Client, Program, is_ready, wait_for


def test_once_around(central: Program, node: Program, tmp_path: Path, collector: Collector) -> None:
    url = f"http://127.0.0.1:{node.settings['EDGE_SERVING__PORT']}"
    wait_for("a ready node", lambda: is_ready(url), 180, tmp_path)
    openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    genesis = openai.chat.completions.create(
        model="lorikeet", messages=[{"role": "user", "content": "w1"}], max_tokens=4
    ).model
    assert genesis.startswith("lorikeet@v0-")

    # Traffic with feedback; every answer was wrong, because the model is random.
    # Many clients send every content as parts; what cannot be learnt is said, and is no example.
    two = {"model": "lorikeet", "prompt": ["w1", "w2"], "max_tokens": 2}
    both = httpx.post(f"{url}/v1/completions", json=two, timeout=60).json()
    told = httpx.post(f"{url}/v1/feedback", json={"id": both["id"], "correction": "w3"}).json()
    assert told["usable"] is False
    environment = NextWord()
    for task in environment.tasks("train", count=20, seed=0):
        answer = openai.chat.completions.create(
            model="lorikeet",
            messages=[
                {"role": "user", "content": [{"type": "text", "text": message["content"]}]}
                for message in task.messages
            ],
            max_tokens=4,
            temperature=0,
        )
        outcome = environment.verify(task, answer.choices[0].message.content or "")
        reply = httpx.post(
            f"{url}/v1/feedback",
            json={"id": answer.id, "score": outcome.score, "correction": outcome.correction},
        )
        assert (reply.status_code, reply.json()["usable"]) == (200, True), reply.text
    status = node.json("status")
    assert (status["examples"], status["unusable_examples"]) == (20, {told["reason"]: 1})

    # A round, held for a human, then approved.
    held = wait_for(
        "a held update",
        lambda: [e for e in node.json("outbox", "list") if e["state"] == "held"] or None,
        120,
        tmp_path,
    )
    assert central.json("updates") == []
    client = Client(url)
    client.start()
    node.run("outbox", "approve", held[0]["update_id"][:10])

    # Merged, evaluated by the node, released, and served without a failed request.
    released = wait_for(
        "a second release",
        lambda: next(
            (
                r
                for r in central.json("releases", "list")
                if "stable" in r["channels"] and r["parent_id"]
            ),
            None,
        ),
        120,
        tmp_path,
    )
    name = f"lorikeet@{released['version']}"
    wait_for("the hot load", lambda: client.models and client.models[-1] == name, 60, tmp_path)
    assert list(released["update_weights"]) == [held[0]["update_id"]]
    (seen,) = central.json("nodes")
    assert seen["status"]["unusable_experiences"] == {told["reason"]: 1}
    evaluated = {r["environment"] for e in released["evaluations"] for r in e["results"]}
    assert evaluated == {"words", "anchor"}
    # Eight tasks decide nothing, so there was a second look at eight others.
    looks = [{r["first_task"] for r in e["results"]} for e in released["evaluations"]]
    assert looks == [{0}, {8}]
    assert [u["state"].lower().removeprefix("update_state_") for u in central.json("updates")] == [
        "merged"
    ]

    # Back to where it was; the update waits again or is set aside, as the operator says.
    central.run("releases", "rollback", "--cohort", "shared", "--updates", "set-aside")
    wait_for("the rollback", lambda: client.models[-1] == genesis, 60, tmp_path)
    client.done.set()
    client.join(10)
    assert client.failures == []
    assert set(client.models) == {genesis, name}
    what_a_scrape_shows(central, url, tmp_path)
    assert node.stop() == 0
    assert central.stop() == 0
    what_the_collector_got(collector, held[0]["update_id"], released["release_id"])


def what_a_scrape_shows(central: Program, url: str, logs: Path) -> None:
    def of_node() -> bool:
        text = httpx.get(f"{url}/metrics").text
        return all(
            line in text
            for line in (
                "lorikeet_node_release_switches_total 2.0",
                'lorikeet_node_rounds_total{outcome="finished"} 1.0',
                'lorikeet_node_outbox_updates{state="admitted"} 1.0',
                "lorikeet_node_experiences 20.0",
                "lorikeet_node_problems 0.0",
                "vllm:generation_tokens_total{",
            )
        )

    wait_for("the node's figures", of_node, 20, logs)
    text = httpx.get(
        f"http://127.0.0.1:{central.settings['CENTRAL_LISTEN__METRICS_PORT']}/metrics"
    ).text
    assert 'lorikeet_central_verdicts_total{cohort="shared",verdict="accepted"} 1.0' in text
    assert 'lorikeet_central_channel_version{channel="stable",cohort="shared"} 0.0' in text
    assert 'lorikeet_central_nodes{cohort="shared",presence="connected"} 1.0' in text


def what_the_collector_got(collector: Collector, update_id: str, release_id: str) -> None:
    """One trace of the update, one of the release, and not a word of a task."""
    for subject, names in (
        (update_id, ("round", "upload", "admission")),
        (release_id, ("merge", "gate", "release", "switch")),
    ):
        for name in names:
            assert subject[:32] in {span.trace_id.hex() for span in collector.named(name)}, name
    [merge] = collector.named("merge")
    assert [link.trace_id.hex() for link in merge.links] == [update_id[:32]]
    assert collector.services == {
        f"lorikeet-{n}" for n in ("central", "node", "learner", "gateway")
    }
    requests = {span.span_id for span in collector.named("request")}
    assert {span.parent_span_id for span in collector.named("capture")} <= requests
    texts = [
        attribute.value.string_value for span in collector.spans for attribute in span.attributes
    ]
    assert not [text for text in texts if re.search(r"\bw\d+\b", text)]
