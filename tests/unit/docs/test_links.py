"""Relative links in every Markdown file lead to a file, and to a heading that is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[3]
NOT_OURS = {".venv", ".git", ".cache", ".hypothesis", "build", "node_modules", "demo-run", "site"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _pages() -> list[Path]:
    return [
        page
        for page in sorted(ROOT.rglob("*.md"))
        if not NOT_OURS.intersection(page.relative_to(ROOT).parts[:-1])
    ]


def _lines(page: Path) -> Iterator[str]:
    """Lines outside fenced and indented code."""
    fenced = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield line


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs make them."""
    return {
        re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in _lines(page)
        if line.startswith("#")
    }


def broken_links(page: Path) -> list[str]:
    """Links of `page` that lead nowhere."""
    found = []
    for line in _lines(page):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                found.append(target)
    return found


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading: of two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#a-heading-of-two) [b](#here) [c](https://example.org) `[d](x.md)`\n"
        "[e](none.md) [f](other.md#none)\n\n    [g](in-code.md)\n```\n[h](in-a-fence.md)\n```\n"
    )
    assert broken_links(page) == ["none.md", "other.md#none"]
