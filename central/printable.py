"""Text that came from elsewhere, made safe to show."""

from __future__ import annotations


def printable(value: object) -> str:
    """The value as text that neither breaks a table nor steers the operator's terminal."""
    return "".join(character if character.isprintable() else " " for character in str(value))
