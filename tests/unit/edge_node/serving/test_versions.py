"""A share of the alias's requests, or chosen keys, get the canary; each version is counted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Key, Scope
from edge_node.errors import ServingError
from edge_node.releases_settings import ReleasesSettings
from edge_node.serving.aliases import AliasTable
from edge_node.serving.versions import Versions

STABLE, CANARY = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"


def make_key(name: str, user: str | None = None) -> Key:
    return Key(
        name=name, sha256="0" * 64, scopes=(Scope.INFER,), user=user, created=datetime.now(UTC)
    )


def make(**settings: Any) -> Versions:
    table = AliasTable("lorikeet", "base@01234567")
    for name in (STABLE, CANARY):
        table.add(name, Path(name))
    table.point(STABLE)
    table.point_canary(CANARY)
    return Versions(table, ReleasesSettings(**settings), chance=chance(), clock=clock())


def chance() -> Any:
    numbers: Iterator[int] = iter(range(10**6))
    return lambda: next(numbers) % 100 / 100


def clock() -> Any:
    times: Iterator[int] = iter(range(10**6))
    return lambda: float(next(times))


def share(versions: Versions, keys: list[Key | None], user: Any = None) -> float:
    chosen = [versions.choose("lorikeet", key, user) for key in keys]
    assert set(chosen) <= {STABLE, CANARY}
    return chosen.count(CANARY) / len(chosen)


def test_a_share_of_requests_keys_and_users_gets_the_canary() -> None:
    versions = make(canary_share=0.2)
    assert share(versions, [None] * 1000) == 0.2
    names = [make_key(f"key-{number}") for number in range(2000)]
    assert share(versions, names) == pytest.approx(0.2, abs=0.03)
    users = [make_key("one-key", f"user-{number}") for number in range(2000)]
    assert share(versions, users) == pytest.approx(0.2, abs=0.03)
    said = [versions.choose(None, make_key("one-key"), f"user-{number}") for number in range(2000)]
    assert said.count(CANARY) / len(said) == pytest.approx(0.2, abs=0.03)


def test_who_got_the_canary_gets_it_again() -> None:
    versions = make(canary_share=0.5)
    for key, user in (
        (make_key("k"), None),
        (make_key("k", "alice"), "ignored"),
        (None, "bob"),
        (None, "\ud800"),
    ):
        assert len({versions.choose("lorikeet", key, user) for _ in range(50)}) == 1
    of_alice = {
        versions.choose("lorikeet", make_key(name, "alice"), None) for name in ("k", "l", "m")
    }
    assert len(of_alice) == 1, "of one user, whatever the key"


def test_another_canary_meets_other_users_first() -> None:
    versions = make(canary_share=0.3)
    keys = [make_key(f"key-{number}") for number in range(200)]
    first = [versions.choose(None, key) == CANARY for key in keys]
    versions._aliases.add("lorikeet@v3-cccccccc", Path("x"))
    versions._aliases.point_canary("lorikeet@v3-cccccccc")
    assert first != [versions.choose(None, key) != STABLE for key in keys]


def test_chosen_keys_get_it_whatever_the_share() -> None:
    versions = make(canary_keys=["testers"])
    assert versions.choose("lorikeet", make_key("testers", "alice")) == CANARY
    assert share(versions, [make_key("others"), None] * 200) == 0


@pytest.mark.parametrize("user", [None, 7, ["x"], {}, ""])
def test_a_user_that_is_no_text_is_none(user: Any) -> None:
    assert share(make(canary_share=0.5), [None] * 100, user) == 0.5


def test_a_request_that_names_a_version_gets_that_one() -> None:
    versions = make(canary_share=1)
    assert versions.choose(STABLE, None) == STABLE
    assert versions.choose("base@01234567", None) == "base@01234567"
    assert versions.choose("nobody", None) == "nobody"
    for alias in (None, "", "lorikeet"):
        assert versions.choose(alias, None) == CANARY


def test_without_a_canary_all_get_the_target() -> None:
    versions = make(canary_share=1, canary_keys=["testers"])
    versions._aliases.point_canary(None)
    assert versions.choose("lorikeet", make_key("testers")) == STABLE


def test_each_version_is_counted_and_nothing_else_is() -> None:
    versions = make()
    for name, status in ((STABLE, 200), (STABLE, 503), (CANARY, 400), ("nobody", 404)):
        answer = versions.enter(name)
        answer.status = status
        versions.leave(answer)
    versions.leave(versions.enter(CANARY))  # it broke before it had a status
    assert versions.counts() == {
        STABLE: {"requests": 2, "errors": 1, "seconds": 2.0},
        CANARY: {"requests": 2, "errors": 1, "seconds": 2.0},
    }
    versions._aliases.point_canary(None)
    versions._aliases.retire(CANARY)
    versions._aliases.remove(CANARY)
    assert set(versions.counts()) == {STABLE}
    assert not versions._aliases.in_flight


def test_the_canary_is_a_loaded_version_and_stays_loaded() -> None:
    versions = make()
    with pytest.raises(ServingError, match="cannot be the canary"):
        versions._aliases.point_canary("lorikeet@v9-99999999")
    with pytest.raises(ServingError, match="is the canary"):
        versions._aliases.retire(CANARY)


def test_a_node_follows_canary_in_one_way() -> None:
    with pytest.raises(ValueError, match="moves the whole node"):
        ReleasesSettings(channel="canary", canary_share=0.1)
    assert not ReleasesSettings(channel="canary").has_canary
    assert ReleasesSettings(canary_keys=["a"]).has_canary


def test_the_nodes_own_adapter_answers_where_the_policy_says_so() -> None:
    own = "lorikeet@own-r1"
    versions = make(serve="best", serve_keys={"plain": "release"}, canary_keys=["testers"])
    versions._aliases.add(own, Path("own"))
    versions._aliases.point_own(own)
    asked = {None: own, "desk": own, "plain": STABLE, "testers": CANARY}
    for name, expected in asked.items():
        assert versions.choose("lorikeet", make_key(name) if name else None) == expected
    assert versions.choose(STABLE, None) == STABLE
    with pytest.raises(ServingError, match="is the node's own adapter"):
        versions._aliases.retire(own)
    versions._aliases.point(STABLE)
    assert versions._aliases.own == own, "the same release again"
    versions._aliases.point_canary(None)
    versions._aliases.point(CANARY)
    assert versions._aliases.own is None, "it was better than the release before"
    assert versions.choose("lorikeet", make_key("desk")) == CANARY


def test_one_key_alone_may_get_it() -> None:
    versions = make(serve_keys={"desk": "best"})
    versions._aliases.point_own(CANARY)
    versions._aliases.point_canary(None)
    assert versions.choose("lorikeet", make_key("desk")) == CANARY
    assert versions.choose("lorikeet", make_key("other")) == STABLE
    assert versions.choose("lorikeet", None) == STABLE
    with pytest.raises(ServingError, match="own adapter"):
        versions._aliases.point_own("lorikeet@own-r9")
