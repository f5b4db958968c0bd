"""`central releases verify`: releases in the data directory, rebuilt and compared byte for byte.

In: settings. Out: one finding per release (cohort/verify.py). Writes nothing and takes no lock: a
central may serve from the same directory meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from central.cli.options import OneCohort
from central.cli.output import print_rows
from central.errors import CentralError
from central.settings import CentralSettings, load_settings
from lorikeet.program import Json

if TYPE_CHECKING:
    from central.cohort.verify import Finding

COLUMNS = ("version", "cohort", "state", "updates", "outcome", "problem")
FINE = ("identical", "forgotten")
LET_GO = ("rejected", "abandoned", "withdrawn")
"""States of releases whose payload central may have deleted."""


def verify(
    release: Annotated[
        str,
        typer.Argument(
            show_default=False, help="Check only this release, instead of every one and candidate."
        ),
    ] = "",
    cohort: OneCohort = "",
    deep: Annotated[
        bool,
        typer.Option("--deep", help="With a release: check its whole line, from version 0 on."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild releases from their updates and compare the bytes.

    It reads the data directory. Central may run or not.
    """
    findings = verify_on_disk(load_settings(), release, cohort, deep)
    rows = [dict(vars(finding)) for finding in findings]
    print_rows(rows, COLUMNS, as_json)
    if bad := [row["version"] for row in rows if not _is_fine(row)]:
        raise CentralError(
            f"{len(bad)} of {len(rows)} releases are damaged or could not be rebuilt to the same "
            f"bytes: {', '.join(bad)}. Expected all identical on the machine that merged them; run "
            "`central journal verify`, and restore missing blobs from a backup."
        )


def _is_fine(row: dict[str, Any]) -> bool:
    return row["outcome"] in FINE or (row["outcome"] == "collected" and row["state"] in LET_GO)


def verify_on_disk(
    settings: CentralSettings, release: str, cohort: str, deep: bool
) -> list[Finding]:
    """Findings for `release`, or for every release and candidate (of one cohort).

    The journal is verified on the way, its end too. Raises Refused for an unknown release or
    cohort, StorageError when it cannot be read or is not whole.
    """
    from central.blobs import open_blobs
    from central.cohort.verify import verify_releases
    from central.history import read_public_key, verify_history
    from central.releases.registry import find_release, unknown_cohort

    store = open_blobs(settings)
    state = verify_history(settings.data_dir, settings.journal_url, store)
    if cohort and cohort not in state.cohorts():
        raise unknown_cohort(state, cohort)
    chosen = [find_release(state, release, cohort)] if release else list(state.releases.values())
    wanted = [r for r in chosen if cohort in ("", r.cohort)]
    return list(verify_releases(state, wanted, store, read_public_key(settings.data_dir), deep))
