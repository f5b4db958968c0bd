"""The routes of the endpoint: which there are, and who may ask them."""

from __future__ import annotations

from edge_node.access import Scope

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE, SCORING = "/tokenize", "/detokenize", "/generative_scoring"
COMPLETIONS = frozenset({CHAT, TEXT})
"""What an agent's session offers."""
ANSWERS = COMPLETIONS | {RESPONSES, MESSAGES}
"""The model writes; its answers are kept."""
OF_A_MODEL = ANSWERS | {COUNT_TOKENS, TOKENIZE, DETOKENIZE, SCORING}
"""The body names a model, so the version is fixed at arrival."""
ANTHROPIC = frozenset({MESSAGES, COUNT_TOKENS})
"""Errors have the form of Anthropic's API; all others have OpenAI's."""
METRICS = "/metrics"
ALWAYS = frozenset({"/health", "/ready", METRICS, "/version"})
"""Answered while the node drains too."""
FEEDBACK = frozenset({"/v1/feedback", "/v1/feedback/ID", "/v1/openapi.json"})
WITH_BODY = OF_A_MODEL | {"/v1/feedback"}
ALLOWED = WITH_BODY | ALWAYS | {"/v1/models"} | FEEDBACK
OPEN = frozenset({"/health", "/ready"})
"""Probes, which have no key and say nothing of anybody's work."""
SCOPES = {
    **dict.fromkeys(OF_A_MODEL | {"/v1/models"}, Scope.INFER),
    **dict.fromkeys(FEEDBACK, Scope.FEEDBACK),
}
"""What a route needs; every other one of ours needs `admin`."""
POOLING = frozenset(
    {"/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank",
     "/v1/rerank", "/v2/rerank"}
)  # fmt: skip
"""vLLM has these for models that write no text. A node's base writes, and has none of them."""


def route_of(path: str) -> str:
    """The route that a path belongs to: itself, but for the feedback with some id."""
    start, _, feedback_id = path.rpartition("/")
    return "/v1/feedback/ID" if start == "/v1/feedback" and feedback_id else path


def unknown_route(path: str) -> str:
    """What a client is told of a path that is no route here."""
    if path in POOLING:
        return (
            f"No route {path}: this node's model writes text, and has no embeddings. "
            f"{SCORING} scores items by the model's next token."
        )
    return f"No route {path}. Routes here: {', '.join(sorted(ALLOWED))}."
