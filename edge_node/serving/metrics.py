"""What Prometheus reads of a node: vLLM's metrics under their names, and ours as `lorikeet_node_*`.

In: the Gateway, vLLM's registry. Out: the text of all of them. Guarantees: a scrape reads memory
alone, no disk; ours are there also when the supervisor tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_node.figures.family import PREFIX, Family, gauge
from edge_node.serving.aliases import PRIVATE
from edge_node.serving.counts import OTHER

if TYPE_CHECKING:
    from edge_node.serving.gateway import Gateway

POLICY = "policy"
"""Stands for every version of the learner's own."""


def metrics_text() -> bytes:
    """vLLM's metrics and ours, in Prometheus' text format."""
    return generate_latest(REGISTRY)


class NodeFigures(Collector):
    """Ours, read from a Gateway. Satisfies prometheus_client's Collector."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def describe(self) -> list[Metric]:
        """Empty: registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        for family in [*self._counted(), *self._gateway.counts.told]:
            yield _metric(family)

    def _counted(self) -> Iterator[Family]:
        gateway, counts = self._gateway, self._gateway.counts
        yield Family(
            f"{PREFIX}requests_total",
            "counter",
            "Answers to clients by route and HTTP status.",
            ("route", "code"),
            tuple(((route, str(code)), n) for (route, code), n in dict(counts.requests).items()),
        )
        loaded = {gateway.aliases.base, *gateway.aliases.public}
        yield Family(
            f"{PREFIX}answers_total",
            "counter",
            "Answers to clients by the version that gave them, of those that are loaded.",
            ("version",),
            tuple(
                ((version,), n) for version, n in dict(counts.answers).items() if version in loaded
            ),
        )
        flying: dict[str, float] = dict.fromkeys(loaded, 0)
        for name, number in dict(gateway.aliases.in_flight).items():
            others = POLICY if name.startswith(PRIVATE) else OTHER
            version = name if name in loaded else others
            flying[version] = flying.get(version, 0) + number
        text = "Requests in flight by version; those of the learner as `policy`, the rest `other`."
        yield from gauge("requests_in_flight", text, flying, "version")
        yield from self._captured()
        ready = gateway.not_ready() is None
        yield from gauge("ready", "1 while the node takes traffic.", int(ready))
        yield from gauge("draining", "1 while the node drains.", int(gateway.draining))
        text = "How long the engine has made no token although one is waited for."
        yield from gauge("engine_silent_seconds", text, gateway.silent_s())
        text = "Longest wait of a user's stream for its first piece, in the last ten seconds."
        yield from gauge("first_token_longest_seconds", text, gateway.first_tokens.longest_s())
        text = "When the supervisor told its figures last, in seconds since 1970."
        yield from gauge("supervisor_told_timestamp_seconds", text, counts.told_at)

    def _captured(self) -> Iterator[Family]:
        recorder = self._gateway.recorder
        kept = recorder.counts()
        yield Family(
            f"{PREFIX}capture_total",
            "counter",
            "Answers that were to be kept, by what became of them; `lost` is never learnt from.",
            ("result",),
            (
                (("captured",), kept.captured),
                (("lost",), kept.lost),
                (("skipped",), kept.skipped),
            ),
        )
        yield Family(
            f"{PREFIX}captured_tokens_total",
            "counter",
            "Tokens of captured prompts and answers.",
            ("kind",),
            ((("prompt",), recorder.prompt_tokens), (("answer",), recorder.answer_tokens)),
        )


def register(gateway: Gateway, registry: CollectorRegistry = REGISTRY) -> None:
    """From now on a scrape of vLLM's registry shows ours too."""
    registry.register(NodeFigures(gateway))


def _metric(family: Family) -> Metric:
    kind = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
    metric = kind(family.name, family.text, labels=family.labels)
    for labels, value in family.samples:
        metric.add_metric(labels, value)
    return metric
