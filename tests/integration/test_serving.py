"""One real vLLM on CPU under VllmProcess: a serving node's whole life, in order."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_node.errors import ServingError
from edge_node.experience import ExperienceStore
from edge_node.serving import ControlClient, VllmProcess
from edge_node.settings import BaseModelSettings, EdgeSettings, ServingSettings
from examples.ports import free_port
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_adapter, tiny_model, write_peft

pytestmark = pytest.mark.timeout(420)

GENESIS, V1, V2 = "lorikeet@v0-00000000", "lorikeet@v1-11111111", "lorikeet@v2-22222222"
PROMPTS = [f"w{number} w{number + 1} w{number + 2}" for number in range(8)]
CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Node:
    vllm: VllmProcess
    control: ControlClient
    store: ExperienceStore
    http: httpx.AsyncClient
    data_dir: Path

    async def ask(self, prompt: str, **body: Any) -> httpx.Response:
        question = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 12,
            "temperature": 0,
        }
        return await self.http.post(CHAT, json={"model": "lorikeet"} | question | body)

    async def answer(self, prompt: str, model: str) -> str:
        response = await self.ask(prompt, model=model)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:  # short enough for a socket path
        data_dir = Path(directory)
        settings = EdgeSettings(
            data_dir=data_dir,
            base=BaseModelSettings(path=tiny_model()),
            # vLLM serves a float32 model in bfloat16. What shares a batch changes its rounding:
            # near ties of a random model then flip, and a text is no proof of its version.
            serving=ServingSettings(port=port, dtype="float32"),
        )
        vllm = VllmProcess(settings, read_base_model(tiny_model()), data_dir / "control.sock")
        running = asyncio.create_task(vllm.run())
        try:
            await vllm.wait_ready()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                store = ExperienceStore(data_dir / "experience.db")
                yield Node(vllm, ControlClient(data_dir / "control.sock"), store, http, data_dir)
        finally:
            await vllm.aclose()
            await running


async def test_the_life_of_a_serving_node(node: Node) -> None:
    await no_release_means_not_ready(node)
    await load_and_point(node)
    texts = await expected_texts(node)
    await what_a_client_may_not_do(node)
    await an_answer_is_durable_before_its_end(node)
    await feedback(node)
    await a_scrape_shows_vllms_figures_and_ours(node)
    await what_was_served_is_what_is_learnt(node)
    await switching_under_load_mixes_nothing(node, texts)
    await unload(node)
    await a_killed_vllm_comes_back_with_its_release(node, texts)


async def no_release_means_not_ready(node: Node) -> None:
    ready = await node.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "No release is active yet.")
    refused = await node.ask("w1")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert (await node.http.get("/health")).status_code == 200


async def a_scrape_shows_vllms_figures_and_ours(node: Node) -> None:
    text = (await node.http.get("/metrics")).text
    dashboard = (ROOT / "deploy" / "monitoring" / "node-dashboard.json").read_text()
    vllms = set(re.findall(r"vllm:[a-z_]+", dashboard))
    assert vllms
    assert not [name for name in vllms if f"\n{name}{{" not in text]
    assert f'lorikeet_node_requests_total{{code="200",route="{CHAT}"}}' in text
    assert f'lorikeet_node_answers_total{{version="{V1}"}}' in text
    assert 'lorikeet_node_capture_total{result="captured"}' in text


async def load_and_point(node: Node) -> None:
    versions = node.data_dir / "releases" / "versions"
    await node.control.load(GENESIS, write_peft(LoraTensors(), versions / "v0"))
    await node.control.load(V1, write_peft(tiny_adapter(1), versions / "v1"))
    await node.control.load(V2, write_peft(tiny_adapter(2), versions / "v2"))
    with pytest.raises(ServingError, match="rank 128 is greater than max_lora_rank 64"):
        await node.control.load(
            "lorikeet@v9", write_peft(tiny_adapter(3, rank=128), versions / "v9")
        )
    await node.control.point(GENESIS)
    ready = await node.http.get("/ready")
    assert (ready.status_code, ready.json()["model"]) == (200, GENESIS)
    models = {
        card["id"]: card["root"] for card in (await node.http.get("/v1/models")).json()["data"]
    }
    base = (await node.control.state()).base
    assert models == {base: base, "lorikeet": GENESIS, GENESIS: GENESIS, V1: V1, V2: V2}


async def expected_texts(node: Node) -> dict[tuple[str, str], str]:
    base = (await node.control.state()).base
    texts = {
        (model, prompt): await node.answer(prompt, model)
        for model in (base, GENESIS, V1, V2)
        for prompt in PROMPTS
    }
    for prompt in PROMPTS:
        assert texts[base, prompt] == texts[GENESIS, prompt], "version 0 is the base itself"
        assert len({texts[model, prompt] for model in (GENESIS, V1, V2)}) == 3, (
            "the adapters must show in the text"
        )
    return texts


async def what_a_client_may_not_do(node: Node) -> None:
    unknown = await node.ask("w1", model="lorikeet@v7")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    for path in (
        "/invocations",
        "/v1/load_lora_adapter",
        "/docs",
        "/openapi.json",
        "/adapters",
    ):
        assert (await node.http.post(path, json={})).status_code == 404, path
    for body in ({"logprobs": True}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": True}):
        assert (await node.ask("w1", **body)).status_code == 200


async def an_answer_is_durable_before_its_end(node: Node) -> None:
    await node.control.point(V1)
    whole = await node.ask(PROMPTS[0])
    captured = node.store.interaction(whole.json()["id"])
    assert captured is not None
    assert captured.model == whole.json()["model"] == whole.headers["x-lorikeet-model"] == V1
    assert captured.answer == whole.json()["choices"][0]["message"]["content"]
    assert captured.messages == [{"role": "user", "content": PROMPTS[0]}]

    body = {
        "model": "lorikeet",
        "messages": captured.messages,
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
    }
    seen: list[tuple[str, bool]] = []
    async with node.http.stream("POST", CHAT, json=body) as stream:
        assert stream.headers["x-lorikeet-model"] == V1
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert chunk["model"] == V1
                seen.append((chunk["id"], False))
            elif line == "data: [DONE]":
                streamed = node.store.interaction(seen[-1][0])
                seen.append((seen[-1][0], streamed is not None))
    assert len(seen) > 3
    assert seen[-1][1], (
        "the interaction must be on disk when the client reads the end of the stream"
    )
    streamed = node.store.interaction(seen[-1][0])
    assert streamed is not None
    assert streamed.answer == captured.answer

    completion = await node.http.post(
        "/v1/completions", json={"model": "lorikeet", "prompt": "w1 w2", "max_tokens": 3}
    )
    kept = node.store.interaction(completion.json()["id"])
    assert kept is not None
    assert (kept.messages, kept.answer) == (
        [{"role": "prompt", "content": "w1 w2"}],
        completion.json()["choices"][0]["text"],
    )
    state = await node.control.state()
    assert (state.lost, state.skipped, state.in_flight) == (0, 0, {})


async def feedback(node: Node) -> None:
    interaction = (await node.ask("w5")).json()["id"]
    body = {"id": interaction, "score": 0, "correction": "w9"}
    first = await node.http.post("/v1/feedback", json=body)
    assert (first.status_code, first.json()["interaction"], first.json()["usable"]) == (
        200,
        interaction,
        True,
    )
    assert (await node.http.post("/v1/feedback", json=body)).json() == first.json()
    (example,) = node.store.examples(up_to=node.store.cursor(), limit=9)
    assert (example.target_ids, example.model, example.feedback_id) == (
        answer_ids("w9"),
        V1,
        first.json()["id"],
    )
    assert example.prompt_ids == prompt_ids("w5")
    unknown = await node.http.post("/v1/feedback", json={"id": "chatcmpl-0", "score": 1})
    assert unknown.status_code == 404
    assert "chatcmpl-0" in unknown.json()["error"]["message"]
    bad = await node.http.post("/v1/feedback", json={"id": interaction, "score": 2})
    assert bad.status_code == 400
    assert "score is 2" in bad.json()["error"]["message"]


async def what_was_served_is_what_is_learnt(node: Node) -> None:
    """vLLM says with `return_token_ids` what it served.

    With a stop string the model's answer has no end.
    """
    call = {"id": "c", "type": "function", "function": {"name": "w7", "arguments": '{"w8": "w9"}'}}
    user = {"role": "user", "content": "w1 w2 w3 w4 w5"}
    said: dict[str, Any] = {"role": "assistant", "content": None}
    two = [{"type": "text", "text": text} for text in ("w1", "w2")]
    shapes: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": two}]}),
        (CHAT, {"messages": [{"role": "developer", "content": "w9"}, user]}),
        (CHAT, {"messages": [user, {**said, "tool_calls": [call]}, {**user, "role": "tool"}]}),
        (CHAT, {"messages": [user, {**said, "content": "w6"}], "continue_final_message": True,
                "add_generation_prompt": False}),
        (CHAT, {"messages": [user], "add_generation_prompt": False}),
        (CHAT, {"messages": [user], "truncate_prompt_tokens": 3, "n": 2, "temperature": 1.0}),
        (CHAT, {"messages": [user], "stop": ["w"], "max_tokens": 40}),
        (CHAT, {"messages": [user], "max_tokens": 400}),
        ("/v1/completions", {"prompt": "w1 w2"}),
        ("/v1/completions", {"prompt": [20, 21, 22], "echo": True, "n": 2, "temperature": 1.0}),
        ("/v1/completions", {"prompt": ["w3"], "truncate_prompt_tokens": 1}),
    ]  # fmt: skip
    ended = []
    for path, shape in shapes:
        for stream in (False, True):
            asked = {"model": "lorikeet", "max_tokens": 5, "temperature": 0, **shape}
            response = await node.http.post(
                path, json={**asked, "stream": stream, "return_token_ids": True}
            )
            assert response.status_code == 200, response.text
            lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
            parts = [json.loads(line) for line in lines if line.startswith("{")]
            choices = [
                choice for part in parts for choice in part["choices"] if choice["index"] == 0
            ]
            prompt = next(ids for at in [*parts, *choices] if (ids := at.get("prompt_token_ids")))
            answer = [token for choice in choices for token in choice.get("token_ids") or []]
            ended.append(answer[-1] == answer_ids("")[0])
            for verdict, target in (
                ({"score": 1}, answer),
                ({"correction": "w8 w9"}, answer_ids("w8 w9")),
            ):
                told = (
                    await node.http.post("/v1/feedback", json={"id": parts[0]["id"], **verdict})
                ).json()
                newest = node.store.examples(up_to=node.store.cursor(), limit=1)[0]
                assert (told["usable"], newest.feedback_id) == (True, told["id"])
                assert (newest.prompt_ids, newest.target_ids) == (tuple(prompt), tuple(target)), (
                    path,
                    shape,
                )
    assert True in ended, "an answer that the model ended holds the token that ended it"
    assert False in ended


async def switching_under_load_mixes_nothing(node: Node, texts: dict[tuple[str, str], str]) -> None:
    answers: list[tuple[str, httpx.Response]] = []
    switched = asyncio.Event()

    async def client(offset: int) -> None:
        turn = offset
        while not switched.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            answers.append((prompt, await node.ask(prompt)))
            turn += 1

    clients = [asyncio.create_task(client(offset)) for offset in range(6)]
    for name in (V2, V1, GENESIS, V2, V1, V2):
        before = len(answers)
        await node.control.point(name)
        while len(answers) < before + 8:
            await asyncio.sleep(0.01)
    switched.set()
    await asyncio.gather(*clients)
    assert [response.text for _, response in answers if response.status_code != 200] == []
    served = set()
    for prompt, response in answers:
        document = response.json()
        served.add(document["model"])
        assert document["model"] == response.headers["x-lorikeet-model"]
        assert document["choices"][0]["message"]["content"] == texts[document["model"], prompt]
        captured = node.store.interaction(document["id"])
        assert captured is not None
        assert captured.model == document["model"]
    assert served == {GENESIS, V1, V2}


async def unload(node: Node) -> None:
    with pytest.raises(ServingError, match="points at"):
        await node.control.unload(V2)
    await node.control.unload(GENESIS)
    assert (await node.ask("w1", model=GENESIS)).status_code == 404
    assert await node.control.probe(30)


async def a_killed_vllm_comes_back_with_its_release(
    node: Node, texts: dict[tuple[str, str], str]
) -> None:
    version = node.data_dir / "releases" / "versions" / "v1"
    active = {"release_id": "11" * 32, "label": "v1-11111111", "path": str(version)}
    (node.data_dir / "releases" / "active.json").write_text(json.dumps(active))
    interactions = node.store.counts().interactions
    before, pid = node.vllm.generation, node.vllm.pid
    assert pid is not None
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children, "the engine core"
    os.kill(pid, signal.SIGKILL)
    while node.vllm.pid == pid:
        await asyncio.sleep(0.05)
    generation = await node.vllm.wait_ready()
    assert generation == before + 1
    for child in children:
        assert not running(child), "the old engine core must not outlive its vLLM"
    ready = await node.http.get("/ready")
    assert (ready.status_code, ready.json()["model"]) == (200, V1)
    assert await node.answer(PROMPTS[0], "lorikeet") == texts[V1, PROMPTS[0]]
    assert node.store.counts().interactions == interactions + 1


def running(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
