"""Settings of what people and machines around the node get from it beside answers.

In: values of settings.py. Out: its groups for logs and traces.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from edge_node.serving_settings import Group
from lorikeet.logs import LogFormat
from lorikeet.traces import wrong_endpoint


class LogSettings(Group):
    format: LogFormat = "text"
    """Form of our log lines: text, or json with an object a line. vLLM's own lines stay text."""


class TraceSettings(Group):
    endpoint: str | None = None
    """OTLP/HTTP collector that gets traces, e.g. http://collector:4318. Unset: none are made.

    Needs the extra `otel`. Headers belong into OTEL_EXPORTER_OTLP_HEADERS.
    """
    sample: float = Field(default=0.01, ge=0, le=1)
    """Share of the requests that are traced. Rounds, uploads and switches always are."""

    @model_validator(mode="after")
    def _is_an_address(self) -> TraceSettings:
        if self.endpoint is not None and (wrong := wrong_endpoint(self.endpoint)):
            raise ValueError(f"EDGE_TRACES__ENDPOINT {wrong}")
        return self
