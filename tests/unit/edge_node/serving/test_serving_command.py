from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from edge_node.errors import ServingError
from edge_node.serving import VllmProcess, command
from edge_node.serving.feedback import read_feedback
from edge_node.settings import CentralSettings, EdgeSettings, ServingSettings
from protos.base import BaseModelInfo

BASE = BaseModelInfo(Path("/models/base"), "0123456789abcdef" * 4, {})


def make_settings(data_dir: Path, **serving: object) -> EdgeSettings:
    return EdgeSettings(
        data_dir=data_dir,
        serving=ServingSettings.model_validate(serving),
        central=CentralSettings.model_validate({"join_token": "secret"}),
    )


def test_the_command_says_what_the_settings_say(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, port=8123, max_loras=5, max_model_len=256, extra_args=["--seed", "1"])
    line = " ".join(command.serving_command(settings, BASE, on_cpu=True))
    for part in (
        "-m vllm.entrypoints.launchers.api_server.entry", "--model /models/base", "--served-model-name base@01234567",
        "--port 8123", "--enable-lora", "--max-loras 5", "--max-lora-rank 64", "--max-cpu-loras 32", "--enforce-eager",
        "--generation-config vllm",
        "--api-server-count 1", "--max-model-len 256",
        "--load-format safetensors --config-format hf --tokenizer-mode hf",
    ):  # fmt: skip
        assert part in line
    assert line.endswith("--seed 1 --middleware edge_node.serving.middleware.LorikeetMiddleware")
    assert "--enforce-eager" not in command.serving_command(settings, BASE, on_cpu=False)


def test_a_text_model_inside_a_wrapper_is_served_alone(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "max_position_embeddings": 1024}
    config = {"model_type": "gemma3", "text_config": shape | {"model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseModelInfo(tmp_path, "ab" * 32, {}, is_wrapped=True)
    line = command.serving_command(make_settings(tmp_path), base, on_cpu=True)
    overrides = json.loads(line[line.index("--hf-overrides") + 1])
    assert overrides == {"architectures": ["LanguageModelOfGemma3ForCausalLM"]}
    assert command.kv_cache_bytes(make_settings(tmp_path), base) == 256 * 1024 * 2 * 4 * 2 * 128
    assert "--hf-overrides" not in command.serving_command(make_settings(tmp_path), BASE, on_cpu=True)


def test_vllm_gets_its_settings_but_no_secret_and_no_back_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(tmp_path, port=8123)
    inherited = {
        "EDGE_CENTRAL__JOIN_TOKEN": "secret", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_PLUGINS": "mine",
        "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    environment = command.serving_environment(settings, tmp_path / "c.sock", inherited, command=[], on_cpu=True)
    assert "secret" not in str(environment)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert (environment["VLLM_PLUGINS"], environment["OMP_NUM_THREADS"]) == ("mine,lorikeet", "3")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_MAX_N_SEQUENCES"] == "128", "the probe must not wait behind thousands of answers"
    for name in list(environment):
        if name.startswith("EDGE_"):
            monkeypatch.setenv(name, environment[name])
    from edge_node.settings import load_settings

    assert load_settings().serving == settings.serving
    assert load_settings().data_dir == settings.data_dir


def test_a_kv_cache_argument_wins_over_the_variable(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, extra_args=["--kv-cache-memory-bytes", "67108864"])
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.serving_environment(
        settings, tmp_path, inherited, command=[], on_cpu=True
    )


def test_a_small_model_gets_a_small_cache_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    base = BaseModelInfo(tmp_path, "ab" * 32, {})
    assert command.kv_cache_bytes(make_settings(tmp_path), base) == 256 * 1024 * 2 * 4 * 2 * 128
    assert command.kv_cache_bytes(make_settings(tmp_path, max_model_len=64), base) == 64 * 2**20
    line = command.serving_command(make_settings(tmp_path), base, on_cpu=True)
    assert line.count("--kv-cache-memory-bytes") == 1
    environment = command.serving_environment(make_settings(tmp_path), tmp_path, {}, command=line, on_cpu=True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    for written in (["--kv-cache-memory-bytes", "1"], ["--kv_cache_memory_bytes=1"]):
        explicit = make_settings(tmp_path, extra_args=written)
        line = command.serving_command(explicit, base, on_cpu=True)
        assert "67108864" not in line
        assert line[-2 - len(written) : -2] == written
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 32}))
    assert command.kv_cache_bytes(make_settings(tmp_path), base) is None


@pytest.mark.parametrize("installed", [{"vllm": "0.31.2"}, {"vllm-cpu": "0.33.0"}, {}])
def test_another_vllm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise command.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(command, "version", version)
    with pytest.raises(ServingError, match="not installed" if not installed else r"vLLM 0\.32\.\*"):
        command.runs_on_cpu()


async def test_a_taken_port_is_named_before_vllm_is_started(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = VllmProcess(make_settings(tmp_path, port=port), BASE, tmp_path / "control.sock")
        with pytest.raises(ServingError, match=rf"Port {port} .*EDGE_SERVING__PORT"):
            await process.run()
        with pytest.raises(ServingError, match="taken"):
            await process.wait_ready()
    assert process.generation == 0
    await process.aclose()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON list"),
        (b'{"id": "a"}', "says nothing"),
        (b'{"score": 1}', "id is None"),
        (b'{"id": "a", "score": 1.5}', "score is 1.5"),
        (b'{"id": "a", "score": true}', "score is True"),
        (b'{"id": "a", "score": NaN}', "score is nan"),
        (b'{"id": "a", "correction": ""}', "correction is ''"),
        (b'{"id": "a", "comment": 3}', "comment is 3"),
        (b'{"id": "a", "scores": 1}', "Unknown field 'scores'"),
        (b"[" * 200_000, "not JSON"),
        (b'\xff\xfe{"id": 1}', "not JSON"),
        (b'{"id": "a", "correction": "\\ud800"}', "correction holds half a surrogate pair"),
        (b'{"id": "\\udfff", "score": 1}', "id holds half a surrogate pair"),
    ],
)
def test_bad_feedback_is_told_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_feedback(body)


def test_a_mistake_is_not_echoed_at_length() -> None:
    with pytest.raises(ValueError, match="comment is") as caught:
        read_feedback(json.dumps({"id": "a", "comment": ["x" * 1000] * 1000}).encode())
    assert len(str(caught.value)) < 300


def test_good_feedback_is_read() -> None:
    feedback = read_feedback(b'{"id": "a", "score": 0, "correction": "b"}')
    assert (feedback.interaction_id, feedback.score, feedback.correction, feedback.comment) == ("a", 0.0, "b", None)
