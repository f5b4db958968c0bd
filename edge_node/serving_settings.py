"""Settings of the serving room: the endpoint, vLLM, who may use it, and how much of it.

In: what `settings.py` read from EDGE_SERVING__*. Out: one frozen group. Imports nothing heavy.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_number(value: Any) -> Any:
    # A variable is text; a Literal of numbers, unlike int, does not read it.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LimitsSettings(Group):
    """Bounds of clients' requests: EDGE_SERVING__LIMITS__*. The node's own requests have none."""

    choices: int = Field(default=128, ge=1)
    """Largest `n` and `best_of`: choices of one prompt. (`n` alone is `false` in YAML.)."""
    prompts: int = Field(default=128, ge=1)
    """Most prompts in one request to /v1/completions."""
    answers: int = Field(default=256, ge=1)
    """Most answers of one request: its prompts times its `n`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest `max_tokens`, `max_completion_tokens` and `max_output_tokens`. It is also what a
    request to chat or responses gets that names none; one to /v1/completions keeps vLLM's 16.
    Unset: the length of the model's context.
    """
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens as the model reads them. Unset: the model's context."""
    body_mib: int = Field(default=64, ge=1)
    """Largest body of a request, in MiB."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most requests of one key a minute. A key that was idle may use them all at once. Requests
    without a key, where they are allowed, count as one key's. Unset: no bound.
    """
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Most requests of one key at the same time. Unset: no bound."""


class TlsSettings(Group):
    """TLS at the endpoint: EDGE_SERVING__TLS__*. Both files, or none: then it speaks plain HTTP."""

    cert_file: Path | None = None
    """PEM file of the certificate and what stands between it and its root. It is read again when
    it changes."""
    key_file: Path | None = None
    """PEM file of its private key, without a password."""

    @model_validator(mode="after")
    def _both_or_none(self) -> TlsSettings:
        if (self.cert_file is None) != (self.key_file is None):
            given, missing = "CERT_FILE", "KEY_FILE"
            if self.cert_file is None:
                given, missing = missing, given
            raise ValueError(
                f"EDGE_SERVING__TLS__{given} is set without EDGE_SERVING__TLS__{missing}. Set both"
            )
        return self


class ServingSettings(Group):
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that the OpenAI-compatible endpoint listens on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI-compatible endpoint."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of /metrics, which needs no key. Unset: /metrics is at the endpoint, for keys with scope
    admin."""
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Address that the metrics port listens on. Whoever reaches it reads how much is asked, and
    nothing of what is asked."""
    tls: TlsSettings = TlsSettings()
    alias: str = Field(default="lorikeet", pattern=r"^[A-Za-z0-9._-]+$")
    """Stable model name that clients use; answers name the exact version as alias@version."""
    dtype: str = "auto"
    """vLLM's --dtype."""
    max_model_len: int | None = Field(default=None, ge=16)
    """vLLM's --max-model-len; the model's own when unset."""
    max_lora_rank: Annotated[
        Literal[8, 16, 32, 64, 128, 256, 320, 512], BeforeValidator(_as_number)
    ] = 64
    """Largest adapter rank; at least the release rank plus the rank of a local round."""
    max_loras: int = Field(default=4, ge=3)
    """Adapters in one batch: stable, the previous one in flight, and an evaluated candidate."""
    max_cpu_loras: int = Field(default=32, ge=4)
    """Adapters kept in memory; at least EDGE_RELEASES__KEEP + 3."""
    extra_args: list[str] = Field(default_factory=list)
    """Further vLLM arguments, as a JSON list. Those that the node sets itself are refused
    (edge_node/vllm_arguments.py)."""
    startup_timeout_s: float = Field(default=600, gt=0)
    """A vLLM that is not ready by then is stopped and started again."""

    access: Literal["auto", "required", "open"] = "auto"
    """Who may use the endpoint. required: who has a key of `edge-node keys`. auto: required beyond
    loopback, and on loopback as soon as there is a key. open: everybody who reaches the port.
    """
    keys_file: Path | None = None
    """File of access keys, as of a Kubernetes Secret. Unset: keys.json in EDGE_DATA_DIR."""
    limits: LimitsSettings = LimitsSettings()

    @model_validator(mode="after")
    def _ports_differ(self) -> ServingSettings:
        if self.metrics_port == self.port:
            raise ValueError(
                f"EDGE_SERVING__METRICS_PORT is {self.port}, the port of the endpoint. Set another "
                "one"
            )
        return self

    @property
    def is_on_loopback(self) -> bool:
        """Only this machine reaches the endpoint."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_open_to_others(self) -> bool:
        """Other machines may use the endpoint, and need no key."""
        return self.access == "open" and not self.is_on_loopback

    @property
    def reached_at(self) -> str:
        """The host by which this machine reaches the endpoint."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
