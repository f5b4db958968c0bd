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
    ("key", "value", "words"),
    [
        ("EDGE_FOO", "1", "EDGE_FOO: unknown setting"),
        ("EDGE_OUTBOX__APROVAL", "auto", "EDGE_OUTBOX__APROVAL: unknown setting"),
        ("EDGE_OUTBOX__APPROVAL", "maybe", "'auto' or 'manual' .value 'maybe'."),
        ("EDGE_SERVING__PORT", "70000", "EDGE_SERVING__PORT"),
        ("EDGE_ENVIRONMENTS", "not json", "expected JSON"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str) -> None:
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


def test_kept_releases_must_fit_and_nothing_else_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CENTRAL__JOIN_TOKEN", "lkt1.secret")
    monkeypatch.setenv("EDGE_RELEASES__KEEP", "40")
    with pytest.raises(SettingsError, match=r"MAX_CPU_LORAS is 32.* needs at least 43") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_an_impossible_vllm_argument_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SERVING__EXTRA_ARGS", '["--api-key", "secret", "--port=9", "--no-enable-lora"]')
    with pytest.raises(
        SettingsError, match="--port is not possible: set EDGE_SERVING__PORT; --no-enable-lora"
    ) as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_vllm_arguments_that_are_no_list_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in ("--api-key secret", '"secret"', '["--api-key", "secret"', '{"api-key": "secret"}'):
        monkeypatch.setenv("EDGE_SERVING__EXTRA_ARGS", written)
        with pytest.raises(SettingsError) as caught:
            load_settings()
        assert "secret" not in str(caught.value), written


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1")])
def test_the_endpoint_is_reached_on_this_machine(host: str, reached: str) -> None:
    assert ServingSettings(host=host).reached_at == reached
