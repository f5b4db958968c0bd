"""`edge-node experience list | show | export | delete | purge | encrypt`, a part of `cli.py`.

In: arguments and EDGE_DATA_DIR. Out: text or JSON; a deletion is said after it is on disk. All of
it works beside a running node, and without one.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TextIO

import typer

from edge_node.errors import EdgeError, StorageError, UnknownInteraction
from edge_node.experience import ExperienceStore, Interaction, open_experience
from edge_node.experience.selection import Selection
from edge_node.experience_export import Decode, Export, Format
from edge_node.settings import EdgeSettings, load_settings
from lorikeet.program import Json

experience = typer.Typer()

UNITS = {"d": "days", "h": "hours", "m": "minutes"}
UNNAMED = "-"
"""The environment of requests that name none."""
Environment = Annotated[
    str | None,
    typer.Option(
        help="Only answers to requests with this header x-lorikeet-environment; - for those "
        "without one.",
        show_default=False,
    ),
]
Episode = Annotated[
    str | None,
    typer.Option(help="Only answers of this x-lorikeet-episode.", show_default=False),
]
User = Annotated[
    str | None,
    typer.Option(help="Only answers to the access keys of this user.", show_default=False),
]
OlderThan = Annotated[
    str | None,
    typer.Option(help="Only answers older than this: 30d, 12h or 90m.", show_default=False),
]


@experience.callback(invoke_without_command=True)
def about(context: typer.Context, as_json: Json = False) -> None:
    """Show, export and delete what the node keeps of requests and feedback."""
    if context.invoked_subcommand is None:
        list_experience(as_json=as_json)


@experience.command("list")
def list_experience(
    environment: Environment = None,
    episode: Episode = None,
    user: User = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(min=0, help="How many answers are shown.")] = 20,
    as_json: Json = False,
) -> None:
    """Count what there is by environment and kind; show the newest answers (the default)."""
    store = _open(load_settings())
    lines = store.lines(_selection(environment, episode, user, older_than), limit=limit)
    kinds, waiting = store.by_environment(), store.waiting()
    if as_json:
        found = {
            "environments": [asdict(one) for one in kinds],
            "waiting": waiting,
            "interactions": [asdict(line) for line in lines],
        }
        print(json.dumps(found, indent=1))
        return
    for one in kinds:
        said = ", ".join(f"{kind} {count}" for kind, count in one.feedback.items())
        print(f"{one.environment or UNNAMED:24} {one.interactions:8} answers  {said}".rstrip())
    if waiting:
        print(f"{waiting} feedback waits for its answer.")
    for line in lines:
        tokens = f"{line.prompt_tokens}+{line.answer_tokens}"
        print(
            f"{line.id:40} {line.created_at[:19]} {line.model:24} "
            f"{line.environment or UNNAMED:12} {tokens:>11}  {line.verdict or line.unusable}"
        )
    if not kinds:
        print("The node kept no answers yet.")


@experience.command("show")
def show(
    interaction: Annotated[str, typer.Argument(help="The `id` of the answer.")],
    as_json: Json = False,
) -> None:
    """Show an answer: its messages, its text, and all that was said of it."""
    store = _open(load_settings())
    found = store.interaction(interaction)
    if found is None:
        raise UnknownInteraction(interaction)
    told, verdict = store.said_of(interaction), store.verdict(interaction)
    if as_json:
        document = asdict(found) | {"verdict": verdict, "feedback": [asdict(one) for one in told]}
        print(json.dumps(document, indent=1))
        return
    _print_interaction(found, verdict)
    for one in told:
        said = [
            f"{name} {value}"
            for name, value in (
                ("score", one.score), ("correction", one.correction), ("comment", one.comment),
                *one.said.items(), ("unusable", one.unusable or None),
            )
            if value is not None
        ]  # fmt: skip
        by = f" by {one.user}" if one.user else ""
        print(f"{one.created_at[:19]} {one.kind}{by} ({one.id}): {'; '.join(said)}")


@experience.command("export")
def export(
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Which form. sft: prompt and completion. kto: with a label. dpo: chosen and "
            "rejected. groups: completions with scores. all: everything that is kept.",
        ),
    ] = Format.all,
    out: Annotated[
        Path | None,
        typer.Option(help="New file, for its owner alone. Unset: standard output."),
    ] = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="Answers to /v1/completions, instead of to messages.")
    ] = False,
    environment: Environment = None,
    episode: Episode = None,
    user: User = None,
    older_than: OlderThan = None,
    as_json: Json = False,
) -> None:
    """Write answers and what was said of them as JSON lines, for TRL and other tools.

    The file holds what users wrote: it is no longer in the node's care. How many lines there are,
    and what was left out, is said on stdout, or on stderr where the lines go to stdout.
    """
    settings = load_settings()
    store = _open(settings)
    selection = _selection(environment, episode, user, older_than)
    made, count = Export(store, _decoder(settings), texts=texts), 0
    with _new_file(out) as file:
        for line in made.lines(form, selection):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    said = sys.stderr if out is None else sys.stdout
    if as_json:
        done = {"lines": count, "left_out": dict(made.left_out), "file": out and str(out)}
        print(json.dumps(done), file=said)
        return
    print(f"{count} lines are written.", file=said)
    for reason, number in made.left_out.items():
        print(f"{number} are left out, because {reason}.", file=said)


@experience.command("delete")
def delete(
    interaction: Annotated[str, typer.Argument(help="The `id` of the answer.")],
    as_json: Json = False,
) -> None:
    """Delete an answer, its prompt and its feedback; no later round learns from it.

    It works while the node serves. A round under way is given up, as it may hold it. What an
    update holds that was sent before is taken out by `central forget`.
    """
    settings = load_settings()
    if not _file(settings).is_file():
        raise UnknownInteraction(interaction)
    store = _open(settings)
    store.delete(interaction)
    so_far = store.deleted_interactions()
    if as_json:
        print(json.dumps({"deleted": interaction, "so_far": so_far}))
    else:
        print(f"Deleted {interaction}; {so_far} were deleted so far.")


@experience.command("purge")
def purge(
    older_than: OlderThan = None,
    environment: Environment = None,
    user: User = None,
    episode: Episode = None,
    everything: Annotated[bool, typer.Option("--everything", help="All that is kept.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; it cannot be undone.")] = False,
    as_json: Json = False,
) -> None:
    """Delete all answers that are named, with their feedback, and free their disk.

    Each condition that is given must hold. It works while the node serves. A round under way is
    given up. --user alone also deletes what that user said of other answers. The ids stay as
    tombstones, so nothing comes back.
    """
    selection = _selection(environment, episode, user, older_than)
    if selection.is_everything != everything:
        raise typer.BadParameter(
            "expected --everything alone, or at least one of --older-than, --environment, --user "
            "and --episode"
        )
    store = _open(load_settings())
    if not yes:
        count = store.count(selection)
        if as_json:
            print(json.dumps({"matching": count, "interactions": 0}))
        else:
            print(
                f"{count} answers match. Nothing was deleted. It cannot be undone: repeat with "
                "--yes."
            )
        raise typer.Exit(1)
    purged = store.purge(selection)
    if as_json:
        print(json.dumps(asdict(purged)))
    else:
        print(
            f"Deleted {purged.interactions} answers and {purged.feedback} feedback; "
            f"{purged.freed_bytes / 1e6:.1f} MB of disk are free again."
        )


@experience.command("encrypt")
def encrypt(as_json: Json = False) -> None:
    """Encrypt what is kept already with the first key in EDGE_EXPERIENCE__KEY_FILE.

    It works while the node serves, after a restart with that file. Killed, it goes on when it is
    run again. Afterwards no older key is needed.
    """
    store = _open(load_settings())
    rows = store.reseal()
    if as_json:
        print(json.dumps({"key": store.key, "rows": rows}))
    else:
        print(f"Encrypted {rows} rows with key {store.key}; all are now.")


def _file(settings: EdgeSettings) -> Path:
    return settings.data_dir / "experience.db"


def _open(settings: EdgeSettings) -> ExperienceStore:
    """The store; raises StorageError where there is none, and makes nothing."""
    path = _file(settings)
    if not path.is_file():
        raise StorageError(
            f"{path} is not there: the node kept nothing yet, or its EDGE_DATA_DIR is another. Run "
            "this with the node's own EDGE_DATA_DIR."
        )
    return open_experience(settings)


def _selection(
    environment: str | None, episode: str | None, user: str | None, older_than: str | None
) -> Selection:
    named = "" if environment == UNNAMED else environment
    before = None if older_than is None else (datetime.now(UTC) - _age(older_than)).isoformat()
    return Selection(before, named, episode, user)


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,5})([dhm])", text)
    if found is None:
        raise typer.BadParameter(f"--older-than is {text!r}; expected such as 30d, 12h or 90m")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _print_interaction(found: Interaction, verdict: str) -> None:
    for name in ("id", "created_at", "model", "endpoint", "environment", "episode", "user"):
        if value := getattr(found, name):
            print(f"{name.replace('_', ' '):12} {value}")
    tokens = f"{len(found.prompt_ids)} of the prompt, {len(found.answer_ids)} of the answer"
    choices = f", {len(found.choices)} choices" if found.choices else ""
    print(f"{'tokens':12} {tokens}{choices}")
    print(f"{'verdict':12} {verdict or 'none'}{f' ({found.unusable})' if found.unusable else ''}")
    for message in found.messages:
        print(f"\n[{message.get('role')}] {message.get('content')}")
    print(f"\n[answer, {found.finish_reason}] {found.answer}\n")


def _decoder(settings: EdgeSettings) -> Decode:
    """Reads token ids with the base's tokenizer, which is loaded when the first ones come."""
    loaded: list[Decode] = []

    def decode(ids: Sequence[int]) -> str:
        if not loaded:
            from edge_node.rendering import ChatFormat, load_renderer

            base = settings.base.path
            if base is None:
                raise EdgeError(
                    "The text of an answer is known in token ids alone, and EDGE_BASE__PATH is not "
                    "set. Expected the directory of the base model, for its tokenizer."
                )
            loaded.append(load_renderer(base, ChatFormat.read(settings.data_dir)).answer_text)
        return loaded[0](ids)

    return decode


@contextmanager
def _new_file(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is there whole or not at all."""
    if path is None:
        yield sys.stdout
        return
    if path.exists():
        raise EdgeError(f"{path} is there already. Name a new file: nothing is overwritten.")
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
