"""What the commands share: a common option, and the way to the running central.

In: settings. Out: a client. Guarantees: gRPC is loaded only when central is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from central.settings import load_settings

if TYPE_CHECKING:
    from central.operators.client import OperatorClient

Channel = Literal["stable", "canary"]
OneCohort = Annotated[str, typer.Option(help="Show only this cohort.")]


@contextmanager
def running_central() -> Iterator[OperatorClient]:
    """A client of the central of the environment's settings; raises SettingsError, StorageError."""
    settings = load_settings()
    from central.operators.client import OperatorClient

    with OperatorClient.connect(settings) as client:
        yield client
