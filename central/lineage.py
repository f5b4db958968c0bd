"""`central releases verify`: what lies in the data directory, checked without a running central.

In: settings. Out: one finding per release (federation/verify.py). Writes nothing and takes no lock: a central may serve from the
same directory meanwhile.
"""

from __future__ import annotations

from central.federation.verify import Finding, verify_releases
from central.history import read_public_key, verify_history
from central.registry import open_blobs
from central.registry.registry import find_release, unknown_cohort
from central.settings import CentralSettings


def verify_on_disk(settings: CentralSettings, release: str, cohort: str, deep: bool) -> list[Finding]:
    """Findings for one release, or for every release and candidate (of one cohort) when `release`
    is empty.

    The journal is verified on the way, its end too. Raises Refused for an unknown release or
    cohort, StorageError when it cannot be read or is not whole.
    """
    store = open_blobs(settings)
    state = verify_history(settings.data_dir, settings.journal_url, store)
    if cohort and cohort not in state.cohorts():
        raise unknown_cohort(state, cohort)
    chosen = [find_release(state, release, cohort)] if release else list(state.releases.values())
    wanted = [r for r in chosen if cohort in ("", r.cohort)]
    return list(verify_releases(state, wanted, store, read_public_key(settings.data_dir), deep))
