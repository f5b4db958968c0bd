"""Answers under way, and what a client says of a request in our headers."""

from __future__ import annotations

import pytest

from edge_node.serving.in_flight import InFlight
from edge_node.serving.labels import Labels, read_labels
from edge_node.serving.refusals import Unreadable

FIRST = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"id":"x"}]}\n\n'


def test_a_stream_is_known_from_its_first_piece_to_its_end_by_its_user() -> None:
    in_flight, alices, everyones = InFlight(), object(), object()
    in_flight.begin(alices, FIRST, "alice")
    in_flight.begin(everyones, FIRST.replace(b"pl-1", b"pl-2"), None)
    both = ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]
    assert in_flight.among(both, None) == {"chatcmpl-1", "chatcmpl-2"}
    assert in_flight.among(both, "alice") == {"chatcmpl-1"}
    assert in_flight.among(both, "bob") == set()
    in_flight.end(alices)
    in_flight.end(alices)
    assert in_flight.among(both, None) == {"chatcmpl-2"}


@pytest.mark.parametrize("piece", [b"", b"data: [DONE]\n\n", b'data: {"id": ""}', b"\xff" * 9])
def test_a_piece_without_an_id_is_no_answer(piece: bytes) -> None:
    in_flight = InFlight()
    in_flight.begin(object(), piece, None)
    assert in_flight.among([""], None) == set()


def test_the_id_of_another_api_is_found_too() -> None:
    in_flight = InFlight()
    piece = b'event: x\ndata: {"type":"response.created","response":{"id":"resp_1","tools":[]}}\n\n'
    in_flight.begin(object(), piece, None)
    assert in_flight.among(["resp_1"], None) == {"resp_1"}


def test_labels_are_read_and_bad_ones_are_told() -> None:
    headers = [(b"x-lorikeet-episode", b"run-7"), (b"host", b"node"), (b"x-lorikeet-episodes", b"")]
    assert read_labels(headers) == Labels("run-7", None)
    assert read_labels([(b"x-lorikeet-environment", b"desk")]) == Labels(None, "desk")
    for value in (b"", b"two words", b"\xc3\xbc", b"x" * 129):
        with pytest.raises(Unreadable, match=r"x-lorikeet-environment is .*; expected 1 to 128"):
            read_labels([(b"x-lorikeet-environment", value)])
