from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from edge_node.errors import ServingError
from edge_node.experience import Answer, EpisodeFeedback, Feedback, Preference, Scores
from edge_node.serving import VllmProcess, command
from edge_node.serving.feedback import read_feedback
from edge_node.serving_settings import TlsSettings
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
    settings = make_settings(
        tmp_path, port=8123, max_loras=5, max_model_len=256, extra_args=["--seed", "1"]
    )
    line = " ".join(command.serving_command(settings, BASE, on_cpu=True))
    for part in (
        "-m edge_node.serving.vllm_entry", "--model /models/base",
        "--served-model-name base@01234567", "--port 8123", "--enable-lora", "--max-loras 5",
        "--max-lora-rank 64", "--max-cpu-loras 32", "--enforce-eager",
        "--generation-config vllm", "--api-server-count 1", "--max-model-len 256",
        "--load-format safetensors --config-format hf --tokenizer-mode hf",
    ):  # fmt: skip
        assert part in line
    assert line.endswith(
        "--seed 1 --middleware edge_node.serving.middleware.LorikeetMiddleware "
        "--middleware edge_node.serving.access.AccessMiddleware"
    )
    assert "--enforce-eager" not in command.serving_command(settings, BASE, on_cpu=False)


def test_tls_has_its_files_and_a_watch(tmp_path: Path) -> None:
    plain = command.serving_command(make_settings(tmp_path), BASE, on_cpu=True)
    assert not [part for part in plain if part.startswith("--ssl")]
    tls = TlsSettings(cert_file=Path("/tls/a.crt"), key_file=Path("/tls/a.key"))
    line = " ".join(command.serving_command(make_settings(tmp_path, tls=tls), BASE, on_cpu=True))
    assert "--ssl-certfile /tls/a.crt --ssl-keyfile /tls/a.key --enable-ssl-refresh" in line


@pytest.mark.parametrize("field", ["cert_file", "key_file"])
def test_one_tls_file_without_the_other_is_a_mistake(field: str) -> None:
    with pytest.raises(ValidationError, match="is set without EDGE_SERVING__TLS__"):
        TlsSettings.model_validate({field: "/tls/a"})


def test_a_text_model_inside_a_wrapper_is_served_alone(tmp_path: Path) -> None:
    shape = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 128,
        "max_position_embeddings": 1024,
    }
    config = {"model_type": "gemma3", "text_config": shape | {"model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseModelInfo(tmp_path, "ab" * 32, {}, is_wrapped=True)
    line = command.serving_command(make_settings(tmp_path), base, on_cpu=True)
    overrides = json.loads(line[line.index("--hf-overrides") + 1])
    assert overrides == {"architectures": ["LanguageModelOfGemma3ForCausalLM"]}
    assert command.kv_cache_bytes(make_settings(tmp_path), base) == 64 * 1024 * 2 * 2 * 2 * 128
    assert "--hf-overrides" not in command.serving_command(
        make_settings(tmp_path), BASE, on_cpu=True
    )


def test_vllm_gets_its_settings_but_no_secret_and_no_back_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path, port=8123)
    inherited = {
        "EDGE_CENTRAL__JOIN_TOKEN": "secret", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "VLLM_PLUGINS": "mine", "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    environment = command.serving_environment(
        settings, tmp_path / "c.sock", inherited, command=[], on_cpu=True
    )
    assert "secret" not in str(environment)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert "VLLM_ENABLE_RESPONSES_API_STORE" not in environment
    assert (environment["VLLM_PLUGINS"], environment["OMP_NUM_THREADS"]) == ("mine,lorikeet", "3")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_MAX_N_SEQUENCES"] == "128", (
        "the probe must not wait behind thousands of answers"
    )
    few, many = (make_settings(tmp_path, limits={"choices": n}) for n in (2, 500))
    for bounded, most in ((few, "128"), (many, "500")):
        environment_of_it = command.serving_environment(
            bounded, tmp_path / "c.sock", {}, command=[], on_cpu=True
        )
        assert environment_of_it["VLLM_MAX_N_SEQUENCES"] == most, "a round asks for up to 128"
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


def test_a_small_model_gets_a_small_cache_unless_the_operator_says_otherwise(
    tmp_path: Path,
) -> None:
    shape = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 128,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    base = BaseModelInfo(tmp_path, "ab" * 32, {})
    assert command.kv_cache_bytes(make_settings(tmp_path), base) == 64 * 1024 * 2 * 2 * 2 * 128
    assert command.kv_cache_bytes(make_settings(tmp_path, max_model_len=64), base) == 64 * 2**20
    line = command.serving_command(make_settings(tmp_path), base, on_cpu=True)
    assert line.count("--kv-cache-memory-bytes") == 1
    environment = command.serving_environment(
        make_settings(tmp_path), tmp_path, {}, command=line, on_cpu=True
    )
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    for written in (["--kv-cache-memory-bytes", "1"], ["--kv_cache_memory_bytes=1"]):
        explicit = make_settings(tmp_path, extra_args=written)
        line = command.serving_command(explicit, base, on_cpu=True)
        assert "67108864" not in line
        assert line[-4 - len(written) : -4] == written
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": [1]}))
    assert command.kv_cache_bytes(make_settings(tmp_path), base) is None, "vLLM gets the variable"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"max_position_embeddings": 8192.0}, 128 << 20),
        ({"max_position_embeddings": float("inf")}, None),
        ({"num_attention_heads": 0, "head_dim": None}, None),
        ({"num_key_value_heads": [1] * 2}, None),
        ([], None),
    ],
)
def test_no_config_json_stops_the_start_of_vllm(
    tmp_path: Path, text: object, expected: int | None
) -> None:
    config = TINY | text if isinstance(text, dict) else text
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = command.kv_cache_bytes(make_settings(tmp_path), BaseModelInfo(tmp_path, "ab" * 32, {}))
    assert (found, type(found)) == (expected, type(expected))


SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 512, "dtype": "float32",
}  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "serving", "expected"),
    [
        # 23,040 bytes a token: 64 sequences of one block.
        (SMOLLM2, {"max_model_len": 128}, 64 * 128 * 23_040),
        (SMOLLM2, {"max_model_len": 100}, 64 * 128 * 23_040),
        (SMOLLM2, {"max_model_len": 128, "dtype": "float32"}, 64 * 128 * 46_080),
        (
            SMOLLM2,
            {"max_model_len": 128, "extra_args": ["--max-num-seqs", "48"]},
            48 * 128 * 23_040,
        ),
        (SMOLLM2, {"max_model_len": 128, "extra_args": ["--max_num_seqs=1"]}, 64 << 20),
        (SMOLLM2, {}, 1 << 30),
        (TINY, {}, 64 << 20),
        # 131,072 bytes a token: one sequence of full length, without which vLLM does not start.
        (LLAMA_8B, {}, (131_072 + 128) * 131_072),
        (LLAMA_8B, {"max_model_len": 16_384}, (2 << 30) + (16 << 20)),
        (LLAMA_8B, {"max_model_len": 2048}, 1 << 30),
    ],
)
def test_the_kv_cache_fits_the_model(
    tmp_path: Path, config: dict[str, object], serving: dict[str, object], expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseModelInfo(tmp_path, "ab" * 32, {})
    settings = make_settings(tmp_path, **serving)
    assert command.kv_cache_bytes(settings, base) == expected
    line = command.serving_command(settings, base, on_cpu=True)
    assert line[line.index("--kv-cache-memory-bytes") + 1] == str(expected)
    assert "--kv-cache-memory-bytes" not in command.serving_command(settings, base, on_cpu=False)


def test_the_operators_cache_space_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    settings, base = make_settings(tmp_path), BaseModelInfo(tmp_path, "ab" * 32, {})
    line = command.serving_command(settings, base, on_cpu=True)
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    environment = command.serving_environment(
        settings, tmp_path, inherited, command=line, on_cpu=True
    )
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4", "in vLLM it wins over the argument"


@pytest.mark.parametrize("installed", [{"vllm": "0.31.2"}, {"vllm-cpu": "0.33.0"}, {}])
def test_another_vllm_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
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
    ("access", "host", "said"),
    [("open", "0.0.0.0", True), ("open", "127.0.0.1", False), ("auto", "0.0.0.0", False)],
)
async def test_the_log_says_that_everybody_may_use_the_endpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, access: str, host: str, said: bool
) -> None:
    with socket.socket() as other:
        other.bind((host, 0))
        other.listen()
        settings = make_settings(tmp_path, port=other.getsockname()[1], host=host, access=access)
        with pytest.raises(ServingError, match="is taken"):
            await VllmProcess(settings, BASE, tmp_path / "control.sock").run()
    assert ("may ask and teach this node" in caplog.text) == said


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
        (b'{"id": "a", "marks": 1}', "Unknown field 'marks'"),
        (b'{"id": "a", "scores": 1}', "scores is 1"),
        (b'{"id": "a", "scores": [1]}', "scores is [1]"),
        (b'{"id": "a", "scores": [1, NaN]}', "scores holds nan; expected finite"),
        (b'{"id": "a", "scores": [1, -1e400]}', "scores holds -inf"),
        (b'{"id": "a", "scores": [1, 1' + b"0" * 400 + b"]}", "scores holds 1000"),
        (b'{"id": "a", "scores": [1, true]}', "scores holds True"),
        (b'{"id": "a", "scores": [1, 0], "score": 1}', "Unknown field 'score'"),
        (b'{"scores": [1, 0]}', "id is None"),
        (b'{"chosen": "a"}', "The feedback has chosen"),
        (b'{"chosen": "a", "rejected": 1}', "rejected is 1"),
        (b'{"id": "a", "chosen": 0, "rejected": -1}', "rejected is -1"),
        (b'{"id": "a", "chosen": 0, "rejected": "b"}', "rejected is 'b'"),
        (b'{"id": "a", "chosen": false, "rejected": 1}', "chosen is False"),
        (b'{"chosen": "\\udfff", "rejected": "b"}', "chosen holds half a surrogate pair"),
        (b"[" * 200_000, "not JSON"),
        (b'\xff\xfe{"id": 1}', "not JSON"),
        (b'{"id": "a", "correction": "\\ud800"}', "correction holds half a surrogate pair"),
        (b'{"id": "\\udfff", "score": 1}', "id holds half a surrogate pair"),
        (b'{"id": "a", "thumb": true}', 'thumb is True; expected "up" or "down"'),
        (b'{"id": "a", "thumb": "up", "score": 1}', "has thumb and score"),
        (b'{"episode": "e"}', "says nothing"),
        (b'{"episode": 1, "score": 1}', "episode is 1; expected the value of the header"),
        (b'{"episode": "e", "correction": "b"}', "'correction' of what is said of an episode"),
        (b'{"episode": "e", "id": "a", "score": 1}', "'id' of what is said of an episode"),
        (b'{"id": "a", "tool_calls": []}', "tool_calls is []"),
        (b'{"id": "a", "tool_calls": [{"function": {}}]}', "tool_calls[0] is"),
        (b'{"id": "a", "tool_calls": [{"function": {"name": "a b"}}]}', "name is 'a b'"),
        (
            b'{"id": "a", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}',
            "tool_calls[0].function.arguments is '[1]'",
        ),
        (
            b'{"id": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1e999}}}]}',
            "tool_calls holds what is no JSON",
        ),
        (
            b'{"id": "a", "tool_calls": [{"function": {"name": "f"}}], "correction": "b"}',
            "has correction and tool_calls",
        ),
    ],
)
def test_bad_feedback_is_told_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_feedback(body)


def test_a_mistake_is_not_echoed_at_length() -> None:
    with pytest.raises(ValueError, match="comment is") as caught:
        read_feedback(json.dumps({"id": "a", "comment": ["x" * 1000] * 1000}).encode())
    assert len(str(caught.value)) < 300


def test_comparisons_are_read() -> None:
    assert read_feedback(b'{"chosen": "a", "rejected": "b"}') == Preference(
        Answer("a"), Answer("b")
    )
    assert read_feedback(b'{"id": "a", "chosen": 2, "rejected": 0}') == Preference(
        Answer("a", 2), Answer("a", 0)
    )
    assert read_feedback(b'{"id": "a", "scores": [1, -0.5]}') == Scores("a", (1.0, -0.5))


def test_every_kind_of_feedback_is_read() -> None:
    assert read_feedback(b'{"id": "a", "thumb": "down"}') == Feedback("a", 0.0, form="thumb")
    assert read_feedback(b'{"episode": "e", "thumb": "up", "comment": "c"}') == EpisodeFeedback(
        "e", 1.0, "c", "thumb"
    )
    for arguments in ('{"x": 1}', json.dumps('{"x": 1}')):
        said = f'{{"id": "a", "tool_calls": [{{"function": {{"name": "f", "arguments": {arguments}'
        feedback = read_feedback((said + "}}]}").encode())
        assert isinstance(feedback, Feedback)
        assert feedback.kind == "tool_calls"
        (call,) = json.loads(feedback.correction or "")
        assert call["function"] == {"name": "f", "arguments": {"x": 1}}
    assert read_feedback(b'{"id": "a", "chosen": 1.0, "rejected": 0}') == Preference(
        Answer("a", 1), Answer("a", 0)
    )


def test_good_feedback_is_read() -> None:
    feedback = read_feedback(b'{"id": "a", "score": 0, "correction": "b"}')
    assert isinstance(feedback, Feedback)
    assert (feedback.interaction_id, feedback.score, feedback.correction, feedback.comment) == (
        "a",
        0.0,
        "b",
        None,
    )
