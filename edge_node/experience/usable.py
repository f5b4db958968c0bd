"""Whether something can be learnt from feedback: the one place where that is decided.

In: what is known of an interaction and of what was said of it. Out: why nothing can be learnt, in
words that stand in status, at central and in the answer to the feedback; empty when it can be used.
Pure; quotes nothing of a customer.
"""

from __future__ import annotations

NOT_ONLY_TEXT = "the prompt holds more than text"
"""Nothing to do: training is on text."""
NOT_ONE_PROMPT = "the answer came from several prompts or from beam search"
"""Send one prompt a request."""
NO_PROMPT = "the prompt's tokens are not known"
"""Report it: vLLM gave none."""
ABORTED = "the client went away before the end of the answer"
"""Nothing: what it did not read cannot be judged."""
NOT_REDACTABLE = "its tokens could not be redacted, so they are not kept"
"""Nothing, or another EDGE_CAPTURE__REDACTION."""
REDACTED = "redaction changed what would be learnt"
"""Nothing: a model must not learn to write placeholders, nor a secret."""
TOO_OLD = "the answer was removed: it is older than this node keeps answers"
"""Judge earlier, or raise EDGE_EXPERIENCE__RETENTION_DAYS."""
TOO_MUCH = "the answer was removed: this node had no more room for it"
"""Judge earlier, or raise EDGE_EXPERIENCE__MAX_MIB."""
NO_TOKENS = "the answer has no tokens"
"""Send a correction: nothing was answered."""
NO_VERDICT = "it says neither that the answer was right nor what would have been right"
"""Nothing to do. A score of 1, one below 0.5 and a correction can be."""
SAME_ANSWERS = "both answers are the same"
"""Nothing to do: there is no difference to learn."""
SAME_SCORES = "all answers have the same score"
"""Nothing to do: there is no difference to learn."""
NO_LOGPROBS = "the log-probabilities of the answers are not known"
"""Nothing to do: the engine gave none for them."""
LIKED, DISLIKED = 1.0, 0.5
"""A score from LIKED on says that the answer was right, one below DISLIKED that it was wrong."""


def why_redacted(known: str, redacted: str, choice: int = 0) -> str:
    """`known`, or that redaction changed the answer. redacted: parts, as the store has them."""
    return known or (REDACTED if str(choice) in redacted.split() else "")


def why_unusable(known: str, prompt_tokens: int, target_tokens: int | None, max_tokens: int) -> str:
    """The reason, or nothing.

    Args:
        known: what capture found against the interaction; empty when nothing.
        prompt_tokens: length of the prompt as served.
        target_tokens: length of what is to be learnt, with the token that ends it; None when it is
            too long to be counted.
        max_tokens: most tokens of prompt and answer together that the model serves, and that a
            round trains on.
    """
    if known:
        return known
    if not prompt_tokens:
        return NO_PROMPT
    if target_tokens is None or prompt_tokens + target_tokens > max_tokens:
        return f"prompt and answer together have more than {max_tokens} tokens"
    return "" if target_tokens else NO_TOKENS
