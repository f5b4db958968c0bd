"""Settings of the edge node: unknown keys and bad values are named, all at once."""

from __future__ import annotations

import pytest

from edge_node.errors import SettingsError
from edge_node.settings import ServingSettings, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)


def test_nested_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_OUTBOX__APPROVAL", "manual")
    monkeypatch.setenv("EDGE_ENVIRONMENTS", '[{"name": "x", "factory": "m:C", "anchor": true}]')
    settings = load_settings()
    assert settings.outbox.approval == "manual"
    assert settings.environments[0].anchor


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("attention", "attention"),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"[a-z.]*\.0\..*", r"[a-z.]*\.0\..*"),
    ],
)
def test_modules_are_a_word_an_expression_or_a_list(
    monkeypatch: pytest.MonkeyPatch, written: str, expected: str | list[str]
) -> None:
    monkeypatch.setenv("EDGE_LEARNING__TARGET_MODULES", written)
    assert load_settings().learning.target_modules == expected


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("EDGE_FOO", "1", "EDGE_FOO: unknown setting"),
        ("EDGE_OUTBOX__APROVAL", "auto", "EDGE_OUTBOX__APROVAL: unknown setting"),
        ("EDGE_OUTBOX__APPROVAL", "maybe", "'auto' or 'manual' .value 'maybe'."),
        ("EDGE_SERVING__PORT", "70000", "EDGE_SERVING__PORT"),
        ("EDGE_ENVIRONMENTS", "not json", "expected JSON"),
        ("EDGE_LEARNING__DEVICE", "cuda:1", "DEVICE: Input should be 'auto', 'cpu' or 'cuda'"),
        ("EDGE_LEARNING__DTYPE", "float16", "'auto', 'float32' or 'bfloat16' .value 'float16'."),
        ("EDGE_LEARNING__TARGET_MODULES", "", "TARGET_MODULES: no name; expected all-linear"),
        ("EDGE_LEARNING__TARGET_MODULES", "[]", "TARGET_MODULES: no name; expected all-linear"),
        ("EDGE_LEARNING__TARGET_MODULES", '["q_proj", ""]', "TARGET_MODULES: no name"),
        ("EDGE_LEARNING__TARGET_MODULES", "(q_proj", "not a regular expression: missing [)]"),
        ("EDGE_LEARNING__TARGET_MODULES", "[1]", "TARGET_MODULES"),
        ("EDGE_LEARNING__GRADIENT_CHECKPOINTING", "some", "CHECKPOINTING: .* valid boolean"),
        ("EDGE_LEARNING__BATCH_TOKENS", "0", "BATCH_TOKENS: .* greater than or equal to 1"),
        ("EDGE_LEARNING__SCHEDULE", '["22:00"]', "SCHEDULE: '22:00' is no window; expected HH:MM-"),
        (
            "EDGE_LEARNING__SCHEDULE",
            "22:00-06:00",
            "EDGE_LEARNING__SCHEDULE.*expected JSON|learning",
        ),
        ("EDGE_LEARNING__YIELD_FIRST_TOKEN_S", "0", "FIRST_TOKEN_S: .* greater than 0"),
        ("EDGE_RELEASES__MAX_ANSWER_TOKENS", "0", "MAX_ANSWER_TOKENS.* greater than or equal to 1"),
        ("EDGE_LEARNING__KL", "-1", "EDGE_LEARNING__KL: .*greater than or equal to 0"),
    ],
)
def test_mistakes_are_named(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    monkeypatch.setenv(key, value)
    with pytest.raises(SettingsError, match=words):
        load_settings()


def test_every_mistake_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FOO", "1")
    monkeypatch.setenv("EDGE_SERVING__PORT", "0")
    with pytest.raises(SettingsError, match=r"EDGE_FOO.*EDGE_SERVING__PORT"):
        load_settings()


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CENTRAL__JOIN_TOKEN", "lkt1.secret")
    assert "secret" not in repr(load_settings())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("EDGE_SERVING__METRICS_PORT", "8000", "the port of the endpoint. Set another one. See"),
        ("EDGE_SERVING__TLS__CERT_FILE", "/tls.crt", "TLS__KEY_FILE. Set both. See"),
    ],
)
def test_settings_that_do_not_go_together_are_named_and_nothing_else_is_shown(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    monkeypatch.setenv("EDGE_SERVING__PORT", "8000")
    monkeypatch.setenv("EDGE_SERVING__EXTRA_ARGS", '["--hf-token", "s3cret"]')
    monkeypatch.setenv(key, value)
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings()
    assert "s3cret" not in str(caught.value)


def test_kept_releases_must_fit_and_nothing_else_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CENTRAL__JOIN_TOKEN", "lkt1.secret")
    monkeypatch.setenv("EDGE_RELEASES__KEEP", "40")
    with pytest.raises(SettingsError, match=r"MAX_CPU_LORAS is 32.* needs at least 43") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_an_answer_is_not_longer_than_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RELEASES__MAX_ANSWER_TOKENS", "256")
    assert load_settings().releases.max_answer_tokens == 256
    monkeypatch.setenv("EDGE_SERVING__MAX_MODEL_LEN", "128")
    with pytest.raises(SettingsError, match=r"ANSWER_TOKENS is 256; .*MAX_MODEL_LEN=128"):
        load_settings()


def test_an_impossible_vllm_argument_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "EDGE_SERVING__EXTRA_ARGS", '["--api-key", "secret", "--port=9", "--no-enable-lora"]'
    )
    with pytest.raises(
        SettingsError, match="--port is not possible: set EDGE_SERVING__PORT; --no-enable-lora"
    ) as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_vllm_arguments_that_are_no_list_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in (
        "--api-key secret",
        '"secret"',
        '["--api-key", "secret"',
        '{"api-key": "secret"}',
    ):
        monkeypatch.setenv("EDGE_SERVING__EXTRA_ARGS", written)
        with pytest.raises(SettingsError) as caught:
            load_settings()
        assert "secret" not in str(caught.value), written


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1")]
)
def test_the_endpoint_is_reached_on_this_machine(host: str, reached: str) -> None:
    assert ServingSettings(host=host).reached_at == reached


def test_a_collector_with_a_password_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGE_TRACES__ENDPOINT", "http://me:secret@collector:4318")
    with pytest.raises(SettingsError, match="EDGE_TRACES__ENDPOINT has a user name") as caught:
        load_settings()
    assert "secret" not in str(caught.value)
