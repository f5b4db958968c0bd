"""OpenTelemetry traces of what both programs do: off unless a program starts them.

In: what was done, for which update or release, and how long it took. Out: spans to a collector,
sent by a thread of their own. The trace id of an update or release is the first 32 digits of its
id, and the id of its first span the next 16. So spans of the learner, the uploader, central and
every node meet in one trace, and nothing has to be sent along.

Guarantees: attributes are names from ATTRIBUTES with plain values, so no prompt, answer or feedback
can be one. While traces are off nothing is imported, and a call costs one comparison.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

ATTRIBUTES = frozenset(
    {
        "update_id", "release_id", "release", "round_id", "method", "steps", "node_id", "cohort",
        "channel", "accepted", "updates", "size_bytes", "route", "status", "version", "result",
        "by",
    }
)  # fmt: skip
"""What a span may say, as `lorikeet.<name>`; texts are cut to MAX_TEXT characters."""
MAX_TEXT = 100
MAX_LINKS = 100
ID = re.compile(r"[0-9a-f]{48,}")
TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
Value = str | int | float | bool
NOT_INSTALLED = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http are not installed"


@dataclass(frozen=True)
class Traces:
    """One per process that traces. `sample`: share of the requests that become a span."""

    tracer: Any
    ids: Any
    sample: float
    shutdown: Callable[[], None]


_here: Traces | None = None
_OFF = nullcontext()


def is_installed() -> bool:
    """Whether the packages of the extra `otel` are there."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None and (
            find_spec("opentelemetry.sdk") is not None
        )
    except ModuleNotFoundError:
        return False


def wrong_endpoint(endpoint: str) -> str:
    """What is wrong with a collector's address, without quoting it; empty when nothing is."""
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint:
        return "is no address; expected http://host:4318 or https://host"
    if parts.username is not None or parts.password is not None:
        return "has a user name or a password; name headers in OTEL_EXPORTER_OTLP_HEADERS instead"
    if parts.query or parts.fragment:
        return "has a query or a fragment; expected http://host:4318 or https://host"
    return ""


def start(endpoint: str, service: str, version: str, sample: float) -> None:
    """Send spans to the OTLP/HTTP collector `endpoint` from now on; once per process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    start_with(BatchSpanProcessor(exporter), service, version, sample)


def start_with(processor: SpanProcessor, service: str, version: str, sample: float) -> None:
    """As `start`, with another way out (for tests)."""
    global _here
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    class Ids(RandomIdGenerator):
        """Gives the next span the ids that are set, once."""

        def __init__(self) -> None:
            self.next: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            return self.next[0] if self.next else super().generate_trace_id()

        def generate_span_id(self) -> int:
            return self.next[1] if self.next else super().generate_span_id()

    ids = Ids()
    resource = Resource({"service.name": service, "service.version": version})
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, id_generator=ids)
    provider.add_span_processor(processor)
    _here = Traces(provider.get_tracer("lorikeet"), ids, sample, provider.shutdown)


def stop() -> None:
    """Send what is left, and be off; idempotent."""
    global _here
    traces, _here = _here, None
    if traces is not None:
        traces.shutdown()


def after(
    name: str,
    subject: str,
    seconds: float,
    *,
    first: bool = False,
    links: Sequence[str] = (),
    **attributes: Value | None,
) -> None:
    """A span that ends now and took `seconds`, in the trace of `subject`.

    Args:
        subject: id of an update or release, in hex. Without one the span has a trace of its own.
        first: it begins that trace; the other spans of the trace are below it.
        links: ids of updates or releases that it came from.
        attributes: names of ATTRIBUTES; None is left out.
    """
    if _here is None:
        return
    from opentelemetry import trace

    ends = time.time_ns()
    root = _context_of(subject)
    parent = None if root is None or first else trace.NonRecordingSpan(root)
    linked = [found for one in links[:MAX_LINKS] if (found := _context_of(one)) is not None]
    if first and root is not None:
        _here.ids.next = (root.trace_id, root.span_id)
    try:
        span = _here.tracer.start_span(
            name,
            context=trace.set_span_in_context(parent or trace.INVALID_SPAN),
            links=[trace.Link(one) for one in linked],
            attributes=_attributes(attributes),
            start_time=ends - int(seconds * 1e9),
        )
    finally:
        _here.ids.next = None
    span.end(ends)


def request(traceparent: bytes | None) -> AbstractContextManager[None]:
    """A span around a request of a client, below the client's own where it sent one.

    Only a share of the requests is traced, whatever the client asks for.
    """
    if _here is None or random.random() >= _here.sample:
        return _OFF
    return _request(_here.tracer, traceparent)


@contextmanager
def _request(tracer: Any, traceparent: bytes | None) -> Iterator[None]:
    from opentelemetry import trace

    parent = _sent_context(traceparent)
    above = trace.set_span_in_context(
        trace.INVALID_SPAN if parent is None else trace.NonRecordingSpan(parent)
    )
    with tracer.start_as_current_span(
        "request", above, record_exception=False, set_status_on_exception=False
    ):
        yield


def say(**attributes: Value | None) -> None:
    """Attributes of the request's span, when they are known; nothing in one that is not traced."""
    if _here is None:
        return
    from opentelemetry import trace

    trace.get_current_span().set_attributes(_attributes(attributes))


def part(name: str, **attributes: Value | None) -> AbstractContextManager[Any]:
    """A span inside a request that is traced; nothing in one that is not."""
    if _here is None:
        return _OFF
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        return _OFF
    started: AbstractContextManager[Any] = _here.tracer.start_as_current_span(
        name,
        attributes=_attributes(attributes),
        record_exception=False,
        set_status_on_exception=False,
    )
    return started


def _attributes(given: dict[str, Value | None]) -> dict[str, Value]:
    if unknown := given.keys() - ATTRIBUTES:
        raise ValueError(f"{sorted(unknown)} are no attributes of spans; expected ATTRIBUTES")
    return {
        f"lorikeet.{name}": value[:MAX_TEXT] if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


def _context_of(subject: str) -> SpanContext | None:
    """Of the first span about an update or release; None for what is no id."""
    from opentelemetry import trace

    if not ID.fullmatch(subject):
        return None
    return trace.SpanContext(
        int(subject[:32], 16),
        int(subject[32:48], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )


def _sent_context(traceparent: bytes | None) -> SpanContext | None:
    """Of the client's span (W3C Trace Context); None when it sent none that can be read."""
    from opentelemetry import trace

    found = TRACEPARENT.fullmatch(traceparent or b"")
    if found is None:
        return None
    context = trace.SpanContext(
        int(found[1], 16),
        int(found[2], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return context if context.is_valid else None
