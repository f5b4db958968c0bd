"""The command line: instant help, plain values, one line per error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from central.cli import main
from central.operator.client import plain
from protos.operator.v1 import operator_pb2
from protos.updates.v1 import updates_pb2


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from central.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'flwr', 'sqlalchemy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("serve", "nodes", "tokens", "releases", "updates", "events"):
        assert command in done.stdout


def test_messages_become_plain_values() -> None:
    update = operator_pb2.Update(update_id="u", size_bytes=1 << 40, state=updates_pb2.UPDATE_STATE_SET_ASIDE)
    assert plain(update)["state"] == "set_aside"
    assert plain(update)["size_bytes"] == 1 << 40
    release = operator_pb2.Release(state=operator_pb2.RELEASE_STATE_CANDIDATE, update_weights={"u": 0.5})
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
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == code
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert text in printed.err
