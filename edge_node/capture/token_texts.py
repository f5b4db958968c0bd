"""The texts of token ids, and which tokens make which characters.

In: the tokenizer that vLLM serves with. Out: text of ids, ids of a text, pieces. Guarantees: a copy
of its own, so that no thread of vLLM's waits or fails because of it; the pieces of ids together are
their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Texts(Protocol):
    """What redaction needs of a tokenizer."""

    def text(self, ids: Sequence[int]) -> str: ...
    def ids(self, text: str) -> list[int]: ...
    def pieces(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """Pieces of the text of `ids` in order, each with the number of tokens that make it.

        Raises ValueError when they cannot be told.
        """


class TokenTexts:
    """Of a Hugging Face tokenizer. One without a fast backend gives no pieces."""

    def __init__(self, tokenizer: Any) -> None:
        self._slow = tokenizer
        self._fast: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            from tokenizers import Tokenizer  # beside the engine alone

            self._fast = Tokenizer.from_str(backend.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()

    def text(self, ids: Sequence[int]) -> str:
        """Of all tokens, special ones too."""
        if self._fast is None:
            return str(self._slow.decode(list(ids), skip_special_tokens=False))
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def ids(self, text: str) -> list[int]:
        """Without the special tokens that begin and end a text."""
        if self._fast is None:
            return list(self._slow(text, add_special_tokens=False)["input_ids"])
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """As `Texts.pieces`. Tokens that make a character together are one piece."""
        if self._fast is None:
            raise ValueError("this tokenizer does not tell which tokens make which characters")
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        made: list[tuple[str, int]] = []
        waiting = 0
        for token in ids:
            waiting += 1
            try:
                piece = stream.step(self._fast, int(token))
            except Exception as error:  # of the Rust library: bytes that are no text
                raise ValueError("the tokens cannot be decoded one after the other") from error
            if piece is not None:
                made.append((piece, waiting))
                waiting = 0
        text = self.text(ids)
        known = "".join(piece for piece, _ in made)
        if waiting:  # the end of a cut character
            made.append((text[len(known) :], waiting))
        if known + (made[-1][0] if waiting else "") != text:
            raise ValueError("the pieces of the tokens are not their text")
        return made
