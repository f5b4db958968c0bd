"""`edge-node experience delete`, of which `cli.py` is the program.

In: arguments and EDGE_DATA_DIR. Out: one line, after the deletion is on disk.
"""

from __future__ import annotations

from typing import Annotated

import typer

from edge_node.errors import UnknownInteraction
from edge_node.settings import load_settings

experience = typer.Typer()


@experience.callback()
def about() -> None:
    """What the node keeps of requests and feedback."""


@experience.command("delete")
def delete(
    interaction: Annotated[str, typer.Argument(help="The `id` of the answer.")],
) -> None:
    """Delete an answer, its prompt and its feedback; no later round learns from it.

    It works while the node serves. A round under way is given up, as it may hold it. What an
    update holds that was sent before is taken out by `central forget`.
    """
    from edge_node.experience import ExperienceStore

    path = load_settings().data_dir / "experience.db"
    if not path.is_file():
        raise UnknownInteraction(interaction)
    store = ExperienceStore(path)
    store.delete(interaction)
    print(f"Deleted {interaction}; {store.deleted()} were deleted so far.")
