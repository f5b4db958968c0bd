"""`central releases verify`: what lies in the data directory, checked without a running central.

In: settings. Out: one finding per release (federation/verify.py). Writes nothing and takes no lock: a central may serve from the
same directory meanwhile.
"""

from __future__ import annotations

from central.errors import StorageError
from central.federation.verify import Finding, verify_releases
from central.journal import verify_journal
from central.registry import open_blobs
from central.registry.registry import find_release, unknown_cohort
from central.settings import CentralSettings


def verify_on_disk(settings: CentralSettings, release: str, cohort: str, deep: bool) -> list[Finding]:
    """Findings for one release, or for every release and candidate (of one cohort) when `release` is empty.

    The journal is verified on the way. Raises Refused for an unknown release or cohort, StorageError when it cannot be read.
    """
    state = verify_journal(settings.journal_url)
    if cohort and cohort not in state.cohorts():
        raise unknown_cohort(state, cohort)
    chosen = [find_release(state, release, cohort)] if release else list(state.releases.values())
    key = settings.data_dir / "pki" / "release.pub.pem"
    try:
        key_pem = key.read_bytes()
    except OSError as error:
        raise StorageError(
            f"The key that releases are signed with cannot be read: {error.strerror} ({key}). Set CENTRAL_DATA_DIR to the "
            "directory that central serves from."
        ) from error
    wanted = [r for r in chosen if cohort in ("", r.cohort)]
    return list(verify_releases(state, wanted, open_blobs(settings), key_pem, deep))
