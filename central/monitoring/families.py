"""Metric families of central, made from plain numbers.

In: a name without the prefix, what it says, label names, values by label values. Out: families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "lorikeet_central_"
Values = Mapping[Any, float]
"""Label values, a tuple -> value."""


def gauge(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    """What goes up and down."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    """What only grows."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
