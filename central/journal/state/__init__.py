"""The state that events imply: `State`, with a handler for every kind of event.

Importing this package registers the handlers; a kind without one is an error at once.
"""

from central.journal.state import (  # noqa: F401
    blobs,
    channels,
    evaluations,
    forgets,
    nodes,
    plans,
    releases,
    tokens,
    updates,
)
from central.journal.state.state import State, expect_all_handled

expect_all_handled()

__all__ = ["State"]
