"""Settings of what people and machines around central reach of it, or get from it.

In: values of settings.py. Out: its groups for ports, logs, webhooks and traces.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorikeet.logs import LogFormat
from lorikeet.traces import wrong_endpoint

EventGroup = Literal["release", "rollback", "problem"]


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ListenSettings(Group):
    host: str = "127.0.0.1"
    """Address that both ports listen on."""
    port: int = Field(default=9443, ge=1, le=65535)
    """Mutual-TLS port for enrolled nodes and operators."""
    enrollment_port: int = Field(default=9444, ge=1, le=65535)
    """Server-TLS port for enrolment only."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for Prometheus, without TLS or keys; unset: none. It names cohorts."""
    metrics_host: str = "127.0.0.1"
    """Address of that port. Whoever reaches it reads every figure."""
    names: list[str] = Field(default_factory=lambda: ["localhost", "127.0.0.1"])
    """DNS names and addresses in central's certificate, as a JSON list."""

    @model_validator(mode="after")
    def _ports_differ(self) -> ListenSettings:
        taken = {self.port}
        for name in ("enrollment_port", "metrics_port"):
            if (port := getattr(self, name)) in taken:
                raise ValueError(
                    f"CENTRAL_LISTEN__{name.upper()} is {port}, which is another port of "
                    "central's too. Set another one"
                )
            taken.add(port)
        return self


class LogSettings(Group):
    format: LogFormat = "text"
    """Form of central's log lines: text, or json with an object a line."""


class TraceSettings(Group):
    endpoint: str | None = None
    """OTLP/HTTP collector that gets traces, e.g. http://collector:4318. Unset: none are made.

    Needs the extra `otel`. Headers belong into OTEL_EXPORTER_OTLP_HEADERS.
    """

    @model_validator(mode="after")
    def _is_an_address(self) -> TraceSettings:
        if self.endpoint is not None and (wrong := wrong_endpoint(self.endpoint)):
            raise ValueError(f"CENTRAL_TRACES__ENDPOINT {wrong}")
        return self


class WebhookSettings(Group):
    urls: list[str] = Field(default_factory=list)
    """Addresses that are told of releases, rollbacks and problems, as a JSON list.

    Each is https, or http to this machine. Cohorts and node ids are told.
    """
    secret_file: Path | None = None
    """File with the secret that signs every request: `whsec_` and base64. Needed with urls."""
    events: list[EventGroup] = ["release", "rollback", "problem"]
    """What is told."""
    plain_http: bool = False
    """True: http to other machines too. Requests are signed but not encrypted."""

    @model_validator(mode="after")
    def _are_addresses(self) -> WebhookSettings:
        for number, url in enumerate(self.urls, 1):
            if wrong := _wrong_with(url, self.plain_http):  # the address itself may hold a token
                raise ValueError(f"address {number} of CENTRAL_WEBHOOKS__URLS {wrong}")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("CENTRAL_WEBHOOKS__URLS names an address twice; expected it once")
        return self


def _wrong_with(url: str, plain_http: bool) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is no address; expected https://host/path"
    if parts.scheme not in ("http", "https") or not host:
        return f"begins with {parts.scheme or 'no scheme'!r}; expected https://host/path"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "has characters that no address has; expected them percent-encoded"
    if parts.username is not None or parts.password is not None:
        return "has a user name or a password; requests are signed instead, so take them out"
    if parts.fragment:
        return "has a fragment (#...), which is never sent; take it out"
    if parts.scheme == "http" and not plain_http and not _is_here(host):
        return (
            "is http, so everybody on the way reads what is told; expected https, or "
            "CENTRAL_WEBHOOKS__PLAIN_HTTP=true"
        )
    return ""


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
