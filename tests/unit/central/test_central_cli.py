"""The command line: instant help, plain values, one line per error."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from central.blobs import DirectoryBlobs
from central.cli import main
from central.cli.output import print_rows
from central.cli.releases import _print_table
from central.errors import REASON_KEY, CentralError
from central.fleet.pki import Pki
from central.heads import Heads
from central.journal import Journal
from central.operators.client import OperatorClient, plain
from central.releases import Registry
from protos.operators.v1 import operators_pb2
from protos.updates.v1 import updates_pb2
from tests.unit.central import builders as make


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from central.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'flwr', 'sqlalchemy', 'numpy', "
        "'grpc', 'rich') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for command in (
        "serve",
        "nodes",
        "tokens",
        "releases",
        "updates",
        "events",
        "journal",
        "backup",
        "restore",
        "retention",
    ):
        assert command in done.stdout


def test_messages_become_plain_values() -> None:
    update = operators_pb2.Update(
        update_id="u", size_bytes=1 << 40, state=updates_pb2.UPDATE_STATE_SET_ASIDE
    )
    assert plain(update)["state"] == "set_aside"
    assert plain(update)["size_bytes"] == 1 << 40
    release = operators_pb2.Release(
        state=operators_pb2.RELEASE_STATE_CANDIDATE, update_weights={"u": 0.5}
    )
    release.evaluations.add(node_id="n").results.add(environment="e", both_passed=3)
    row = plain(release)
    assert (row["state"], row["update_weights"], row["channels"]) == ("candidate", {"u": 0.5}, [])
    assert row["evaluations"][0]["results"][0]["both_passed"] == 3


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "text"),
    [
        (["nodes"], {}, 5, "central serve"),
        (["serve"], {}, 2, "CENTRAL_BASE__PATH is not set"),
        (["serve"], {"CENTRAL_BASE__PATH": "/nowhere"}, 2, "does not exist"),
        (["nodes"], {"CENTRAL_PORT": "1"}, 2, "CENTRAL_PORT: unknown setting"),
        (
            ["nodes"],
            {"CENTRAL_MERGE__COHORTS": '{"zeta": {"rank": "x", "nope": 1}}'},
            2,
            "CENTRAL_MERGE__COHORTS zeta.rank: Input should be a valid integer, unable to parse "
            "string as an integer (value 'x'); CENTRAL_MERGE__COHORTS zeta.nope: unknown setting",
        ),
        (
            ["nodes"],
            {
                "CENTRAL_CHANNELS__COHORTS": '{"acme": {"first": "beta"}}',
                "CENTRAL_COHORTS__BUILDS_ON": '{"shared": "shared"}',
            },
            2,
            "CENTRAL_CHANNELS__COHORTS acme.first: Input should be 'stable' or 'canary' (value "
            "'beta'); CENTRAL_COHORTS__BUILDS_ON shared: expected none, it is what others build on",
        ),
        (["journal", "verify"], {}, 5, "unable to open database file"),
        (["journal", "verify"], {"CENTRAL_JOURNAL__URL": "sqlite://"}, 5, "in memory"),
        (["journal", "verify"], {"CENTRAL_JOURNAL__URL": "no url"}, 5, "Could not parse"),
        (["journal", "verify"], {"CENTRAL_JOURNAL__URL": "mysql+nodriver://x/y"}, 5, "nodriver"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in {"CENTRAL_DATA_DIR": str(tmp_path), **environment}.items():
        monkeypatch.setenv(key, value)
    assert run(*arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokens", "create", "--valid-hours", "nan"],
        ["tokens", "create", "--valid-hours", "inf"],
        ["tokens", "create", "--uses", str(2**40)],
        ["events", "--after", str(2**64)],
    ],
)
def test_a_number_that_cannot_be_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Pki.load_or_create(tmp_path, [])
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    assert run(*arguments) == 1
    assert "is not possible. Expected" in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Pki.load_or_create(tmp_path, [])
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    assert run("releases", "show", "\udcff") == 2
    assert "not UTF-8 text" in capsys.readouterr().err


def test_the_journal_is_verified_beside_a_running_central(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    blobs, key = DirectoryBlobs(tmp_path / "blobs"), Pki.load_or_create(tmp_path, []).release_key
    journal = Journal(f"sqlite:///{tmp_path}/journal.db", seals=Heads(tmp_path, blobs, key))
    Registry(journal, blobs, key, make.BASE).ensure_cohort("shared")
    journal.append(make.token_created(), make.node_enrolled())
    digest = journal.events()[-1].hash
    assert run("journal", "verify") == 0
    assert (
        capsys.readouterr().out
        == f"The journal is whole: 3 events, the last one with hash {digest}.\n"
    )
    journal.close()
    stray = blobs.put(b"of no event")
    assert run("journal", "verify") == 0
    assert f"Blobs that no event names: 1 ({stray})" in capsys.readouterr().out
    assert run("journal", "verify", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "events": 3,
        "hash": digest,
        "unnamed_blobs": [stray],
    }
    for change, number in (("body = 'null'", 3), ("subject = 'x'", 2)):
        with sqlite3.connect(tmp_path / "journal.db") as other:
            other.execute(f"update events set {change} where sequence = {number}")
        assert run("journal", "verify") == 5
        assert f"Journal event {number} " in capsys.readouterr().err


class Failed(grpc.RpcError):
    """A call that central could not answer; `metadata` says whether central itself spoke."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.metadata = metadata

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the disk is full"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata


@pytest.mark.parametrize(
    ("metadata", "code", "text"),
    [
        ((), 4, "does not answer at host:1"),
        (((REASON_KEY, "STORAGE_FAILED"),), 1, "the disk is full"),
    ],
)
def test_a_central_that_refuses_is_not_one_that_is_away(
    metadata: tuple[tuple[str, str], ...], code: int, text: str
) -> None:
    def call(request: object, timeout: float) -> None:
        raise Failed(metadata)

    with (
        grpc.insecure_channel("host:1") as channel,
        pytest.raises(CentralError, match=text) as caught,
    ):
        OperatorClient(channel, "host:1").ask(call, operators_pb2.ListNodesRequest())
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("arguments", "is_json"),
    [
        (["nodes"], False),
        (["nodes", "--json"], True),
        (["nodes", "--json", "list"], True),
        (["nodes", "list", "--json"], True),
        (["nodes", "list"], False),
    ],
)
def test_json_may_stand_before_or_after_the_action(
    arguments: list[str],
    is_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Pki.load_or_create(tmp_path, [])
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    answer = operators_pb2.ListNodesResponse(nodes=[operators_pb2.Node(node_id="a-1")])
    monkeypatch.setattr(OperatorClient, "ask", lambda *_: answer)
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[\n" if is_json else "node_id")
    assert "a-1" in printed


def test_a_nodes_words_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"problem": "disk\n\x1b[2Jfull"}], ("problem",), as_json=False)
    assert capsys.readouterr().out == "problem\ndisk  [2Jfull\n"


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code


def test_releases_are_listed_with_what_was_gained_and_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = operators_pb2.ListReleasesResponse()
    answer.releases.add(version="v0-aaaaaaaa", cohort="shared")
    figures = operators_pb2.ContinualFigures(environments=3, average=81.26, forgetting=0.0)
    answer.releases.add(version="v1-bbbbbbbb", cohort="shared", continual=figures)
    _print_table(answer, as_json=False)
    header, base, first = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["average", "forgetting", "verdict"]
    assert base.split() == ["v0-aaaaaaaa", "shared", "unspecified", "0"]
    assert first.split()[-2:] == ["81.3", "0.0"]
    _print_table(answer, as_json=True)
    base, first = json.loads(capsys.readouterr().out)
    assert (base["continual"]["average"], base["continual"]["forgetting"]) == (None, None)
    assert (first["continual"]["average"], first["continual"]["forgetting"]) == (81.26, 0.0)
    assert first["continual"]["backward_transfer"] is None, "there was nothing to lose"
