"""Open streams of a node are counted, and the next one is refused when there are too many."""

from __future__ import annotations

import pytest

from central.errors import Reason, Refused
from central.fleet.streams import OpenStreams


def test_a_node_may_have_so_many_streams_and_others_do_not_count() -> None:
    streams = OpenStreams("uploads", 2, "CENTRAL_LIMITS__NODE_UPLOADS")
    with streams.one("a"), streams.one("b"):
        with streams.one("a"):
            with pytest.raises(
                Refused, match=r"Node a has 2 uploads open; central allows 2 \(CENTRAL_LIMITS__"
            ) as caught:
                streams.one("a").__enter__()
            assert caught.value.reason is Reason.TOO_MANY_STREAMS
        with streams.one("a"):  # one ended
            pass


def test_a_stream_that_fails_is_not_open_any_more() -> None:
    streams = OpenStreams("watches", 1, "CENTRAL_LIMITS__NODE_WATCHES")
    for _ in range(2):
        with pytest.raises(ConnectionError), streams.one("a"):
            raise ConnectionError
