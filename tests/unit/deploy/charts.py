"""Renders our charts with the real Helm engine.

In: chart name, value files and overrides. Out: the Kubernetes objects, as dicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).resolve().parents[3]
CHARTS = ROOT / "deploy" / "charts"

REQUIRED: dict[str, dict[str, Any]] = {
    "central": {"model": {"existingClaim": "base-model"}},
    "edge-node": {
        "model": {"existingClaim": "base-model"},
        "joinToken": {"secretName": "join-token"},
        "settings": {
            "central": {
                "address": "central.lorikeet:9443",
                "enrollment_address": "central.lorikeet:9444",
            },
            "environments": [{"name": "desk", "factory": "acme.desk:Desk", "options": {"seed": 3}}],
        },
    },
}
"""The least that a user has to say."""

VARIANTS = [
    ("central", None),
    ("edge-node", None),
    ("edge-node", "values-cpu.yaml"),
    ("edge-node", "values-gpu.yaml"),
]
"""Chart and value file of everything we ship."""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, maps are merged: what Helm does with several -f."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def render(
    chart: str, value_file: str | None = None, overrides: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The objects of one release named `demo` in namespace `lorikeet`."""
    values = yaml.safe_load((CHARTS / chart / value_file).read_text()) if value_file else {}
    values = merge(merge(values, REQUIRED[chart]), overrides or {})
    with Chart.load(CHARTS / chart) as loaded:
        rendered = loaded.render(values, name="demo", namespace="lorikeet")
    texts = [text for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def stateful_set(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == "StatefulSet"]
    return found


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (only,) = stateful_set(objects)["spec"]["template"]["spec"]["containers"]
    return dict(only)
