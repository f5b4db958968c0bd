"""Records the golden journal of a version that is about to be released.

Run once for a new version: `python -m tests.golden.record_journal tests/golden/<version>/journal`.
It refuses a folder that is there: an old version is never recorded again.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from central.backup.format import event_line
from central.journal import read_journal, verify_journal
from protos.manifest import canonical_json
from tests.golden.implied_state import implied
from tests.golden.journal_story import Recorder, record


def main(target: Path) -> None:
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="lorikeet-golden-") as folder:
        data_dir = Path(folder)
        central = Recorder(data_dir)
        record(central)
        central.close()
        database = data_dir / "journal.db"
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # all of it in one file
        shutil.copy(database, target)
        shutil.copy(data_dir / "journal.head", target)
    url = f"sqlite:///{target / 'journal.db'}"
    (target / "journal.jsonl").write_bytes(b"".join(map(event_line, read_journal(url))))
    (target / "release.pub.pem").write_bytes(central.public_key)
    (target / "state.json").write_bytes(canonical_json(implied(verify_journal(url))) + b"\n")
    for path in target.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
