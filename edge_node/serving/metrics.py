"""What Prometheus reads at the metrics port, in its text format."""

from __future__ import annotations

import importlib
from typing import cast


def metrics_text() -> bytes:
    """vLLM's metrics, under vLLM's names. For any thread of vLLM's process."""
    registry = importlib.import_module("vllm.v1.metrics.prometheus").get_prometheus_registry()
    written = importlib.import_module("prometheus_client").generate_latest(registry)
    return cast(bytes, written)
