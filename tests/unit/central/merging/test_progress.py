"""How far a merge has come: in the log, in the operators' list, and gone when it is over."""

from __future__ import annotations

import logging

import pytest

from central.cli.output import print_merging
from central.merging import ProductSum, progress
from central.merging.progress import Stage, shown, under_way
from central.operators.listing import merges_under_way
from tests.unit.central.merging.lora_factors import NAMES, make_update


def test_words() -> None:
    stage = Stage("merged", "modules", 61, 210, begun=100.0)
    assert stage.words(now=116.4) == "61 of 210 modules merged, 40 s left"
    assert Stage("read", "payloads", 0, 9, 0.0).words(5.0) == "0 of 9 payloads read"
    assert Stage("read", "payloads", 9, 9, 0.0).words(5.0) == "9 of 9 payloads read"


def test_a_merge_says_how_far_it_is_until_it_ends() -> None:
    with shown("acme", payloads=2), shown("other", payloads=9):
        pass
    assert under_way() == []
    with shown("acme", payloads=2):
        total = ProductSum(rank=3, seed=0)
        for seed, expected in ((1, "1 of 2 payloads read, "), (2, "2 of 2 payloads read")):
            total.add(make_update(seed), 1.0)
            (merge,) = merges_under_way("acme")
            assert merge.progress.startswith(expected)
        assert list(merges_under_way("other")) == []
        total.result()
        assert [str(merge) for merge in under_way()] == [f"{len(NAMES)} of 3 modules merged"]
    assert under_way() == []


def test_a_merge_that_fails_is_no_longer_shown() -> None:
    with pytest.raises(ValueError, match="inside"), shown("acme", payloads=1):
        raise ValueError("inside")
    assert under_way() == []


def test_a_replay_that_reads_more_than_its_plan_names_has_no_share_above_all() -> None:
    with shown("acme", payloads=1):
        total = ProductSum(rank=3, seed=0)
        for seed in range(3):
            total.add(make_update(seed), 1.0)
        assert [str(merge) for merge in under_way()] == ["3 of 3 payloads read"]


def test_the_log_has_a_line_now_and_then_and_not_one_a_module(monkeypatch, caplog) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with shown("acme", payloads=1), caplog.at_level(logging.INFO, "central.merging"):
        (merge,) = under_way()
        merge.cut(210)
        for _ in range(210):
            now += 0.25
            merge.step()
    lines = [record.progress for record in caplog.records]
    assert lines[0] == "40 of 210 modules merged, 42 s left"
    assert len(lines) == 5


def test_the_list_of_releases_says_it_first(capsys) -> None:
    with shown("acme", payloads=4):
        merges = merges_under_way("")
    for json, stream in ((False, 0), (True, 1)):
        print_merging(merges, json)
        assert capsys.readouterr()[stream] == "Cohort acme is merging: 0 of 4 payloads read\n"
