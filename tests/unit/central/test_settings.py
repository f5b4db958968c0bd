"""Settings of central that only make sense together, and what their refusal says."""

from __future__ import annotations

import pytest

from central.errors import SettingsError
from central.settings import load_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("METRICS_PORT", "9443"), ("METRICS_PORT", "9444"), ("ENROLLMENT_PORT", "9443")],
)
def test_a_port_is_not_given_twice(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CENTRAL_LISTEN__{name}", value)
    with pytest.raises(SettingsError, match=f"CENTRAL_LISTEN__{name} is {value}, which is another"):
        load_settings()


def test_two_unset_ports_are_no_clash() -> None:
    assert load_settings().listen.metrics_port is None


def test_an_address_that_may_hold_a_token_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENTRAL_WEBHOOKS__URLS", '"https://hooks.example.org/s3cret"')
    with pytest.raises(SettingsError, match="CENTRAL_WEBHOOKS__URLS: Input should be a valid") as e:
        load_settings()
    assert "s3cret" not in str(e.value)
