"""The routes of the endpoint: which there are, and who may ask them."""

from __future__ import annotations

from edge_node.access import Scope

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ALWAYS = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Answered while the node drains too."""
ALLOWED = COMPLETIONS | ALWAYS | {"/v1/models", "/v1/feedback"}
WITH_BODY = COMPLETIONS | {"/v1/feedback"}
OPEN = frozenset({"/health", "/ready"})
"""Probes, which have no key and say nothing of anybody's work."""
SCOPES = dict.fromkeys(COMPLETIONS | {"/v1/models"}, Scope.INFER) | {"/v1/feedback": Scope.FEEDBACK}
"""What a route needs; every other one of ours needs `admin`."""
