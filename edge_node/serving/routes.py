"""The routes of the endpoint: which there are, and who may ask them."""

from __future__ import annotations

from edge_node.access import Scope

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ALWAYS = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Answered while the node drains too."""
FEEDBACK = frozenset({"/v1/feedback", "/v1/feedback/ID", "/v1/openapi.json"})
ALLOWED = COMPLETIONS | ALWAYS | {"/v1/models"} | FEEDBACK
WITH_BODY = COMPLETIONS | {"/v1/feedback"}
OPEN = frozenset({"/health", "/ready"})
"""Probes, which have no key and say nothing of anybody's work."""
SCOPES = {
    **dict.fromkeys(COMPLETIONS | {"/v1/models"}, Scope.INFER),
    **dict.fromkeys(FEEDBACK, Scope.FEEDBACK),
}
"""What a route needs; every other one of ours needs `admin`."""


def route_of(path: str) -> str:
    """The route that a path belongs to: itself, but for the feedback with some id."""
    start, _, feedback_id = path.rpartition("/")
    return "/v1/feedback/ID" if start == "/v1/feedback" and feedback_id else path
