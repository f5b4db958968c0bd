"""Every way to write an argument that the node cannot work with, and what is left alone."""

from __future__ import annotations

import pytest

from edge_node import vllm_arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--uds", "/run/x"],
            "--uds is not possible: set EDGE_SERVING__HOST and EDGE_SERVING__PORT",
        ),
        (["--port=9000"], "--port is not possible: set EDGE_SERVING__PORT"),
        (
            ["--served_model_name", "x"],
            "--served-model-name is not possible: set EDGE_SERVING__ALIAS",
        ),
        (["--serv", "x"], "--serv is not possible: set EDGE_SERVING__ALIAS"),
        (["--no_enable_lora"], "releases are LoRA adapters"),
        (["--hf-overrides.rope_theta", "1"], "--hf-overrides is not possible"),
        (["--seed", "1", "-asc", "2"], "-asc is not possible"),
        (["-n2"], "-n2 is not possible"),
        (["-asc=2"], "-asc is not possible"),
        (
            ["--load-format", "dummy"],
            "--load-format is not possible: the learner reads the base from its files",
        ),
        (["--config-format=mistral"], "--config-format is not possible"),
        (["--tokenizer_mode", "mistral"], "--tokenizer-mode is not possible"),
        (["--config", "x.yaml"], "write its arguments into EDGE_SERVING__EXTRA_ARGS itself"),
        (
            ["--api-key", "sk-1", "sk-2"],
            "--api-key is not possible: make keys with `edge-node keys",
        ),
        (["--api_key=sk-1"], "--api-key is not possible: make keys with `edge-node keys"),
        (["--enable-log-requests"], "it writes prompts or answers into logs/vllm.log"),
        (["--enable_log_outputs"], "it writes prompts or answers into logs/vllm.log"),
        (["some/model"], "the first item is no argument"),
        (["--seed 1"], "--seed is in one item with its value"),
        (["--api-key sk-1"], "--api-key is in one item with its value"),
        (
            ["--lora-modules", '{"name": "a", "path": "b"}'],
            "the node loads central's releases itself",
        ),
    ],
)
def test_what_the_node_cannot_work_with_is_refused(arguments: list[str], expected: str) -> None:
    (mistake,) = vllm_arguments.mistakes(arguments)
    assert expected in mistake
    assert "sk-1" not in mistake


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--allowed-origins", "a", "--allowed-origins=b", "c"],
        ["--ssl-ca-certs", "k", "--ssl_cert_reqs=2"],
        ["--middleware", "my.Own"],
        ["-tp", "2", "-dp", "2", "-O3"],
        ["--max-num-batched-tokens", "-1"],
        ["--chat-template", "- {{ messages }}"],
        ["--chat-template=--port {{ messages }}"],
        ["--compilation-config.level", "3"],
        ["--model-impl", "transformers", "--tokenizer-revision=x"],
    ],
    ids=str,
)
def test_the_rest_is_vllms_to_judge(arguments: list[str]) -> None:
    assert vllm_arguments.mistakes(arguments) == []


def test_the_last_value_counts() -> None:
    arguments = ["--ssl_keyfile", "a", "--seed", "1", "--ssl-keyfile=b", "--ssl-certfile"]
    assert vllm_arguments.value(arguments, "--ssl-keyfile") == "b"
    assert vllm_arguments.value(arguments, "--ssl-certfile") is None
    assert vllm_arguments.value(arguments, "--uds") is None
