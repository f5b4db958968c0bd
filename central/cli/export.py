"""`central releases export`: a release as a PEFT adapter, for programs that know nothing of us.

In: settings, a release, a folder. Out: the folder with the adapter and `release.json`, which says
what it is, with central's signature. Writes nothing else and takes no lock: a central may serve
from the same data directory meanwhile.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from central.errors import CentralError, StorageError
from central.settings import CentralSettings, load_settings
from lorikeet.program import Json

if TYPE_CHECKING:
    from central.journal import ReleaseRecord

DESCRIPTION = "release.json"


def export(
    release: Annotated[
        str,
        typer.Argument(
            help="Its id, the first 6 or more digits of it, or its version (v3-7f3a9c01)."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write a release as a PEFT adapter, which PEFT and vLLM load.

    It reads the data directory. Central may run or not.
    """
    written = export_release(load_settings(), release, folder)
    if as_json:
        print(json.dumps(written))
    else:
        print(
            f"{folder}: {written['release']} of {written['cohort']} ({written['state']}), "
            f"rank {written['rank']}, {written['modules']} modules."
        )


def export_release(settings: CentralSettings, release: str, folder: Path) -> dict[str, object]:
    """Writes the folder; what it holds.

    The folder appears whole or not at all. Raises Refused for an unknown release or one whose
    payload is gone, CentralError for version 0 and a folder that exists, StorageError when the
    journal, the payload or the folder cannot be used.
    """
    from central.blobs import open_blobs
    from central.history import verify_history
    from central.releases.registry import expect_kept, find_release
    from protos.lora import decode
    from protos.peft import peft_files

    if folder.exists():
        raise CentralError(f"{folder} exists already. Expected a folder that does not: name one.")
    store = open_blobs(settings)
    state = verify_history(settings.data_dir, settings.journal_url, store)
    found = find_release(state, release)
    if found.state == "withdrawn":
        raise CentralError(
            f"Release {found.label} is withdrawn: it holds a contribution that was forgotten, and "
            "is given to nobody any more. Export a later release."
        )
    expect_kept(state, found)
    adapter = decode(store.read(found.manifest.payload.digest_sha256))
    if not adapter.modules:
        raise CentralError(
            f"Release {found.label} is the base itself, without an adapter. Export a later release."
        )
    files = peft_files(adapter) | {DESCRIPTION: _description(found)}
    _write(folder, files)
    return {
        "release": found.label,
        "cohort": found.cohort,
        "state": found.state,
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "folder": str(folder),
    }


def _description(release: ReleaseRecord) -> bytes:
    """What is in the folder: the manifest exactly as central signed it, and the signature."""
    document = {
        "release": release.release_id,
        "label": release.label,
        "cohort": release.cohort,
        "base": release.manifest.base,
        "state": release.state,
        "manifest": release.manifest_bytes.decode(),
        "signature": base64.b64encode(release.signature).decode(),
    }
    return json.dumps(document, indent=1).encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The folder with these files, or none at all."""
    building = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, data in files.items():
            (building / name).write_bytes(data)
        building.chmod(0o755)
        building.replace(folder)
    except OSError as error:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        raise StorageError(
            f"{folder} cannot be written: {error}. Name a folder on a disk with room."
        ) from error
