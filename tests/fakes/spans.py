"""Traces of this process into memory.

In: nothing. Out: the finished spans. Guarantees: traces are off again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lorikeet import traces


class Spans:
    """What was recorded so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def __iter__(self) -> Iterator[ReadableSpan]:
        return iter(self._exporter.get_finished_spans())

    @property
    def names(self) -> list[str]:
        return [span.name for span in self]

    def one(self, name: str) -> ReadableSpan:
        [found] = [span for span in self if span.name == name]
        return found


@contextmanager
def recorded_spans(sample: float = 1.0) -> Iterator[Spans]:
    """Traces are on inside the block."""
    exporter = InMemorySpanExporter()
    traces.start_with(SimpleSpanProcessor(exporter), "lorikeet-tests", "0", sample)
    try:
        yield Spans(exporter)
    finally:
        traces.stop()
