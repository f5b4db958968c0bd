"""The reference pages are made of docstrings: every setting, command, code and reason is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field

from central.errors import Reason
from docs import generate

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"


class Group(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the
    endpoint."""
    names: list[str] | None = None
    """a|b."""
    way: Literal["auto", "manual"] = "auto"
    """How."""


class Undocumented(BaseModel):
    port: int = 1


def test_pages_are_what_the_code_gives() -> None:
    stale = [path.name for path, text in generate.pages() if path.read_text() != text]
    assert not stale, f"{stale} differ. Next: {generate.COMMAND}"


def test_check_names_a_page_that_differs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "settings.md").write_text("old")
    assert generate.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "settings.md" in error
    assert generate.COMMAND in error
    assert (tmp_path / "settings.md").read_text() == "old"


def test_a_setting_has_its_variable_kind_default_and_docstring() -> None:
    text = generate.settings_of(Group, "EDGE_", "###")
    assert (
        "| `EDGE_PORT` | whole number, at least 1, at most 65535 | `8000` | Port of the endpoint. |"
    ) in text
    assert "| `EDGE_NAMES` | JSON list | unset | a\\|b. |" in text
    assert "| `EDGE_WAY` | `auto`, `manual` | `auto` | How. |" in text


def test_a_setting_without_a_docstring_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no docstring"):
        generate.settings_of(Undocumented, "EDGE_", "###")


def test_every_command_is_there_with_its_options() -> None:
    app = typer.Typer(help="A program.", add_completion=False)
    releases = typer.Typer(help="Candidates and releases.")
    app.add_typer(releases, name="releases")

    @app.command()
    def serve() -> None:
        """Serve until stopped."""

    @releases.command(epilog="Exit code: 0.")
    def promote(
        release: Annotated[str, typer.Argument(help="id or version")],
        channel: Annotated[str, typer.Option(help="stable|canary")] = "stable",
    ) -> None:
        """Point a channel at a release."""

    @releases.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    page = generate.cli_page({"central": app})
    assert "## central\n\nA program." in page
    assert "### central serve\n\nServe until stopped." in page
    assert "    central releases promote [OPTIONS] RELEASE" in page
    assert "| `RELEASE` |" in page
    assert "| `--channel TEXT` | stable\\|canary" in page
    assert "Exit code: 0." in page
    assert "secret" not in page


def test_every_reason_says_what_it_means() -> None:
    assert set(generate.attribute_docs(Reason)) == {reason.name for reason in Reason}


def test_exit_codes_are_those_of_the_errors() -> None:
    page = (REFERENCE / "exit-codes.md").read_text()
    edge, central = page.split("## central")
    assert "| 3 | Central refused the node" in edge
    assert "| 7 | " in edge
    assert "| 6 | A port is taken" in central
