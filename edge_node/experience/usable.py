"""Whether something can be learnt from feedback: the one place where that is decided.

In: what is known of an interaction and of what was said of it. Out: why nothing can be learnt, in
words that stand in status, at central and in the answer to the feedback; empty when it can be used.
Pure; quotes nothing of a customer.
"""

from __future__ import annotations

NOT_ONLY_TEXT = "the prompt holds more than text"
NOT_ONE_PROMPT = "the answer came from several prompts or from beam search"
NO_PROMPT = "the prompt's tokens are not known"
NO_TOKENS = "the answer has no tokens"
NO_VERDICT = "it says neither that the answer was right nor what would have been right"


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
