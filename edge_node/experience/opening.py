"""Opens a node's experience store as its settings say: where it is, and with which keys.

In: settings. Out: the store. Raises SettingsError for a key file that cannot be used, StorageError
for a store that cannot be opened or that another key sealed.
"""

from __future__ import annotations

from edge_node.experience.database import BUSY_TIMEOUT_S
from edge_node.experience.sealing import read_key_file
from edge_node.experience.store import ExperienceStore
from edge_node.settings import EdgeSettings

FILE_NAME = "experience.db"


def describe_experience(settings: EdgeSettings, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> str:
    """How much is kept and how, for `doctor`; makes nothing. Raises as `open_experience`."""
    bounds, sealing = settings.experience, read_key_file(settings.experience.key_file)
    days, mib = bounds.retention_days, bounds.max_mib
    kept = f"kept for {days:g} days" if days is not None else "no bound of age"
    size = f"at most {mib} MiB" if mib is not None else "no bound of size"
    key = f"encrypted with key {sealing.current}" if sealing.current else "not encrypted"
    held = "nothing is held"
    if (settings.data_dir / FILE_NAME).is_file():
        store = open_experience(settings, busy_timeout_s=busy_timeout_s)
        held = f"{store.held_bytes() >> 20} MiB held"
        store.close()
    return f"{held}; {kept}, {size}; {key}; redaction {settings.capture.redaction}"


def open_experience(
    settings: EdgeSettings, *, busy_timeout_s: float = BUSY_TIMEOUT_S
) -> ExperienceStore:
    """The store of the data directory; made when it is absent."""
    return ExperienceStore(
        settings.data_dir / FILE_NAME,
        busy_timeout_s=busy_timeout_s,
        sealing=read_key_file(settings.experience.key_file),
    )
