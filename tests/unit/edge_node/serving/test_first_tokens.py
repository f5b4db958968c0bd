from __future__ import annotations

from edge_node.serving.first_tokens import FirstTokens


def test_the_longest_wait_of_late_counts_also_while_it_goes_on() -> None:
    now = 0.0
    waits = FirstTokens(lambda: now)
    assert waits.longest_s() == 0
    waits.begin("slow")
    now = 2.0
    waits.begin("fast")
    now = 2.5
    assert waits.longest_s() == 2.5
    waits.came("fast")
    waits.came("slow")
    now = 8.0
    waits.came("slow")  # a later piece
    assert waits.longest_s() == 2.5
    waits.left("slow")
    now = 12.5
    assert waits.longest_s() == 2.5
    now = 12.6
    assert waits.longest_s() == 0


def test_a_stream_that_leaves_without_a_piece_counts_no_more() -> None:
    now = 0.0
    waits = FirstTokens(lambda: now)
    waits.begin("gone")
    now = 9.0
    waits.left("gone")
    assert waits.longest_s() == 0
