"""Settings of what people and machines around central reach of it, or get from it.

In: values of settings.py. Out: its groups for ports, logs, webhooks and traces.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
