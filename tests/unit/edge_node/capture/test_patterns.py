from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edge_node.capture.patterns import Patterns

SET = Path(__file__).with_name("redaction_set.jsonl")
"""Made by the authors of the patterns, so the figures are better than those of other texts. `¦`
stands in keys and tokens, so that no scanner of source code takes them for real ones.
"""
FOUND = {
    "EMAIL": (34, 36),
    "PHONE": (75, 80),
    "CARD": (24, 24),
    "IBAN": (25, 25),
    "SECRET": (47, 49),
}
"""Kind -> found, of how many. docs/privacy.md has these figures."""
FALSE_SPANS = 1
HOSTILE = (
    "a", "@", "1", "a" * 64 + "@", "@a.a.a.a.a.a.a.a", "DE12 ", "12-", "(", "[at]a.", "://a:",
    "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----a", "password: aaaa", "tel 1234567 ", "İpassword",
    "DE89 3704 0044 0532 0130 01 ", "4111 1111 1111 1112 ", "sk-aaaaaaaaaaaaaaaaa", "-----",
    "{ at } a . ", "\U0001f642",
)  # fmt: skip


def read_set() -> list[dict[str, Any]]:
    lines = SET.read_text().replace("¦", "").splitlines()
    return [json.loads(line) for line in lines]


def found_in(text: str) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in sorted(Patterns().find(text))]


def test_recall_and_precision_on_the_test_set_are_those_of_the_documentation() -> None:
    rows = read_set()
    assert sum(not row["find"] for row in rows) >= 200
    assert sum(bool(row["find"]) for row in rows) >= 200
    found: Counter[str] = Counter()
    false: list[tuple[str, str]] = []
    for row in rows:
        text, spans = row["text"], Patterns().find(row["text"])
        covered = {place for span in spans for place in range(span.start, span.end)}
        wanted = [(text.index(part), text.index(part) + len(part)) for part in row["find"]]
        for start, end in wanted:
            places = [place for place in range(start, end) if text[place].isalnum()]
            found[row["kind"]] += covered.issuperset(places)
        false += [
            (span.kind, text)
            for span in spans
            if not any(span.start < end and start < span.end for start, end in wanted)
        ]
    assert {kind: (found[kind], total) for kind, (_, total) in FOUND.items()} == FOUND
    assert len(false) == FALSE_SPANS, false


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail 'bob@example.org'.", [("EMAIL", "bob@example.org")]),
        ("a@b.de, c@d.de", [("EMAIL", "a@b.de"), ("EMAIL", "c@d.de")]),
        ("(+49) 30 901820", [("PHONE", "+49) 30 901820")]),
        ("4111 1111 1111 1111 12/29", [("CARD", "4111 1111 1111 1111")]),
        ("4111 1111 1111 1112", []),  # the check digit is wrong
        ("DE89 3704 0044 0532 0130 00", [("IBAN", "DE89 3704 0044 0532 0130 00")]),
        ("DE89 3704 0044 0532 0130 01", []),
        ("DE89370400440532013000 and more", [("IBAN", "DE89370400440532013000")]),
        ("12:30:45.123456789", []),
        ("-1234567890.12345678", []),
        ("token = self.make.token1", []),
    ],
)
def test_what_is_found(text: str, expected: list[tuple[str, str]]) -> None:
    assert found_in(text) == expected


def test_nothing_is_lost_where_windows_meet() -> None:
    address, window = "anna.schmidt@example.org", 1 << 16
    for shift in range(-len(address) - 1, 2):
        text = " " * (window + shift) + address + " " * window
        assert ("EMAIL", address) in found_in(text), shift


@pytest.mark.parametrize("unit", HOSTILE)
def test_time_grows_with_length_alone(unit: str) -> None:
    times = []
    for size in (1 << 16, 1 << 18):
        text = (unit * (size // len(unit) + 1))[:size]
        before = time.process_time()
        Patterns().find(text)
        times.append(time.process_time() - before)
    assert times[1] < 10 * times[0] + 0.05  # four times as long
    assert times[1] < 2
