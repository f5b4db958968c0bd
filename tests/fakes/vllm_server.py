"""vLLM's real API server over an engine that only counts: everything of a request but the model.

In: a base directory, settings, the engine's answers. Out: the ASGI app with our middleware and
plug-in, as `edge-node` starts it. Requests are parsed, rendered, streamed and parsed back by vLLM's
own code.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from edge_node.serving import gateway as gateways
from edge_node.serving.command import serving_command
from edge_node.serving.gateway import Gateway
from edge_node.settings import EdgeSettings
from protos.base import read_base_model

VERSION = "lorikeet@v1-aaaaaaaa"


class CountingEngine:
    """Answers every prompt with `answer`, token by token where the request streams."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.renderers import renderer_from_config

        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = SimpleNamespace(resolve_watermarking=lambda params: None)
        self.io_processor = None
        self.errored, self.dead_error, self.is_running = False, None, True
        self.answer: list[int] = [70, 71, 72]
        self.stop: tuple[str, int | str | None] = ("stop", None)
        self.prompts: list[list[int]] = []
        self.refusal: Exception | None = None
        """What it raises before its first token, as for a grammar that does not compile."""
        self.asked: list[Any] = []
        """The sampling parameters of each generation."""
        self.closed = 0
        """Generations that ended, by themselves or because the client went away."""

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncIterator[Any]:
        from vllm.logprobs import Logprob
        from vllm.outputs import CompletionOutput, RequestOutput
        from vllm.sampling_params import RequestOutputKind

        ids = prompt["prompt_token_ids"]
        self.asked.append(sampling_params)
        self.prompts.append(list(ids))
        if self.refusal is not None:
            raise self.refusal
        streamed = sampling_params.output_kind == RequestOutputKind.DELTA
        answer = self.answer[: sampling_params.max_tokens]
        steps = [[token] for token in answer] if streamed else [answer]
        tokenizer = self.renderer.get_tokenizer()
        try:
            for number, step in enumerate(steps):
                last = number == len(steps) - 1
                choices = [
                    CompletionOutput(
                        index=index,
                        text=tokenizer.decode(
                            step, skip_special_tokens=sampling_params.skip_special_tokens
                        ),
                        token_ids=[token + index for token in step],
                        cumulative_logprob=None if sampling_params.logprobs is None else -1.0,
                        logprobs=None
                        if sampling_params.logprobs is None
                        else [{token + index: Logprob(-token / 64 - index)} for token in step],
                        finish_reason=self.stop[0] if last else None,
                        stop_reason=self.stop[1] if last else None,
                    )
                    for index in range(sampling_params.n)
                ]
                yield RequestOutput(
                    request_id=request_id, prompt=None, prompt_token_ids=ids, prompt_logprobs=None,
                    outputs=choices,
                    finished=last, num_cached_tokens=0,
                )  # fmt: skip
        finally:
            self.closed += 1

    async def add_lora(self, request: Any) -> bool:
        return True

    async def check_health(self) -> None:
        return None

    def check_admission(self, *_: Any) -> None:
        return None


class Server:
    """A started app. `http` reaches it; `gateway` is its inside."""

    def __init__(self, http: httpx.AsyncClient, engine: CountingEngine, gateway: Gateway) -> None:
        self.http, self.engine, self.gateway = http, engine, gateway


@asynccontextmanager
async def api_server(base: Path, data_dir: Path, *extra_args: str) -> AsyncIterator[Server]:
    """`data_dir` is short enough for a socket path. The environment is put back at the end."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = EdgeSettings.model_validate(
        {"data_dir": data_dir, "base": {"path": base}, "serving": {"extra_args": list(extra_args)}}
    )
    command = serving_command(settings, read_base_model(base), on_cpu=True)
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    validate_parsed_serve_args(arguments)
    variables = {
        "EDGE_DATA_DIR": str(data_dir),
        "EDGE_BASE__PATH": str(base),
        "LORIKEET_CONTROL_SOCKET": str(data_dir / "control.sock"),
        "VLLM_PLUGINS": "lorikeet",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        engine = CountingEngine(AsyncEngineArgs.from_cli_args(arguments).create_engine_config())
        app = build_app(arguments, ("generate",), engine.model_config)
        client: Any = engine
        await init_app_state(client, app.state, arguments, ("generate",))
        gateway = gateways.here
        assert gateway is not None
        await gateway.engine.load(VERSION, data_dir)
        gateway.aliases.add(VERSION, data_dir)
        gateway.point(VERSION)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://node", timeout=60
        ) as http:
            yield Server(http, engine, gateway)
        await app.state.lorikeet_control.aclose()
        gateway.keys.close()
        gateway.recorder.close()
        gateway.store.close()
    finally:
        gateways.here = None
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
