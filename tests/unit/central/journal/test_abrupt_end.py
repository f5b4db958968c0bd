"""What `append` returned for survives a process that ends without closing anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from central.journal import Journal
from tests.unit.central import builders as make

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = """
import os, sys
from central.journal import Journal
from tests.unit.central import builders as make
journal = Journal(sys.argv[1])
genesis = make.start_cohort(journal)
for sequence in range(1, 6):
    journal.append(make.admitted(make.make_update(genesis, sequence=sequence)))
    print(sequence, flush=True)
os._exit(1)
"""


def test_a_journal_is_whole_after_an_abrupt_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/journal.db"
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.split()) == (1, ["1", "2", "3", "4", "5"]), ended.stderr
    journal = Journal(url)
    assert journal.verify() == 8
    with journal.read() as state:
        assert [update.manifest.sequence for update in state.waiting("shared")] == [1, 2, 3, 4, 5]
        genesis = state.genesis("shared").manifest
    assert journal.append(make.admitted(make.make_update(genesis, sequence=6)))[0].sequence == 9
