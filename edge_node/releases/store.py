"""The node's releases on disk.

In: signed manifests and payload bytes. Out: immutable version directories and the name of the
active one. A manifest is taken only with central's signature, this node's base and this node's
cohort; a payload only when its digest fits. A version directory appears whole, by one rename, and
is never changed while vLLM may read it. Of a release of a larger rank than EDGE_RELEASES__MAX_RANK
it holds the first pairs (protos/prefix.py), beside the whole payload as central signed it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_node.disk import read_json, write_file
from edge_node.errors import AdapterError, StorageError
from edge_node.identity import Identity
from edge_node.releases.peft_directory import directory_rank, peft_files
from lorikeet.durable import sync
from protos.base import BaseModelInfo
from protos.lora import LoraCodecError, LoraTensors, decode
from protos.manifest import ManifestError, ReleaseManifest, verify
from protos.prefix import prefix
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredRelease:
    """A version that is whole on disk; `path` is a PEFT directory."""

    release_id: str
    manifest: ReleaseManifest
    path: Path

    @property
    def label(self) -> str:
        return self.manifest.label


class ReleaseStore:
    """Owner of `releases/` in the data directory. `max_rank`: EDGE_RELEASES__MAX_RANK."""

    def __init__(
        self, data_dir: Path, identity: Identity, base: BaseModelInfo, max_rank: int | None = None
    ) -> None:
        self._root = data_dir / "releases"
        self._max_rank = max_rank
        self._identity = identity
        self._base = base
        self._digests: dict[str, dict[str, str]] = {}
        """Of each release's PEFT files, made from its payload; by id and name."""
        self._installing = threading.Lock()
        """A cancelled download leaves its thread at work, and the same release may come again."""
        try:
            for name in ("versions", "partial"):
                (self._root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"Cannot create {self._root}: {error.strerror}. EDGE_DATA_DIR must be writable."
            ) from error

    def clear_leftovers(self) -> None:
        """Deletes what a crash left half made. Only the data directory's holder may call it."""
        for leftover in (self._root / "partial").glob("*.directory"):
            shutil.rmtree(leftover, ignore_errors=True)

    def fit_ranks(self) -> None:
        """Remake directories of another rank than this node serves, from the payloads beside them.

        Before vLLM and the learner start: an adapter is never replaced under them.
        """
        for folder in sorted((self._root / "versions").iterdir()):
            try:
                manifest = ReleaseManifest.from_bytes((folder / "manifest.json").read_bytes())
                if self._rank_fits(manifest, folder):
                    continue
                signature = (folder / "signature.bin").read_bytes()
                payload = (folder / "payload.safetensors").read_bytes()
                signed = releases_pb2.SignedManifest(
                    manifest=manifest.to_bytes(), signature=signature
                )
                rank = directory_rank(self.install(signed, payload).path)
            except (
                ManifestError,
                AdapterError,
                OSError,
            ) as error:  # it counts as not there, and is downloaded again
                log.warning(
                    "release directory not fitted",
                    extra={"path": folder, "why": type(error).__name__},
                )
                continue
            log.info(
                "release fitted to another rank", extra={"release": manifest.label, "rank": rank}
            )

    def check(self, signed: releases_pb2.SignedManifest) -> ReleaseManifest:
        """The manifest, once signature, base and cohort fit; raises AdapterError."""
        try:
            verify(self._identity.release_key_pem, signed.manifest, signed.signature)
            manifest = ReleaseManifest.from_bytes(signed.manifest)
        except ManifestError as error:
            raise AdapterError(
                f"Central sent a release manifest that is not usable: {error}"
            ) from error
        if manifest.base != self._identity.base or manifest.cohort != self._identity.cohort:
            raise AdapterError(
                f"Release {manifest.label} is for base {manifest.base[:8]} and cohort "
                f"{manifest.cohort!r}; this node has base {self._identity.base[:8]} and cohort "
                f"{self._identity.cohort!r}. It was not loaded."
            )
        return manifest

    def get(self, release_id: str) -> StoredRelease | None:
        """The version on disk, or None. A damaged one or one of another rank counts as none."""
        path = self._root / "versions" / release_id
        try:
            manifest = ReleaseManifest.from_bytes((path / "manifest.json").read_bytes())
            fits = self._rank_fits(manifest, path)
        except FileNotFoundError:
            return None
        except (ManifestError, AdapterError, OSError) as error:
            log.warning(
                "damaged release directory", extra={"path": path, "why": type(error).__name__}
            )
            return None
        return StoredRelease(release_id, manifest, path) if fits else None

    def partial(self, release_id: str) -> Path:
        """Where a download of this release's payload grows; it goes on from there after a cut."""
        return self._root / "partial" / f"{release_id}.payload"

    def install(self, signed: releases_pb2.SignedManifest, payload: bytes) -> StoredRelease:
        """Make a version directory from a manifest and its payload; idempotent.

        Raises:
            AdapterError: signature, cohort, base, digest or content do not fit; nothing was kept.
            StorageError: the disk refused.
        """
        manifest = self.check(signed)
        with self._installing:
            return self.get(manifest.digest) or self._install(signed, manifest, payload)

    def _install(
        self, signed: releases_pb2.SignedManifest, manifest: ReleaseManifest, payload: bytes
    ) -> StoredRelease:
        digest = hashlib.sha256(payload).hexdigest()
        if digest != manifest.payload.digest_sha256:
            raise AdapterError(
                f"Payload of release {manifest.label} has digest {digest[:12]}; its manifest says "
                f"{manifest.payload.digest_sha256[:12]}. It is downloaded again."
            )
        try:
            whole, files = self._files(payload)
        except LoraCodecError as error:
            raise AdapterError(
                f"Payload of release {manifest.label} is not usable: {error}"
            ) from error
        if whole.rank != manifest.rank:
            raise AdapterError(
                f"Payload of release {manifest.label} has rank {whole.rank}; its manifest says "
                f"{manifest.rank}. It was not loaded."
            )
        files |= {
            "payload.safetensors": payload,
            "manifest.json": signed.manifest,
            "signature.bin": signed.signature,
        }
        folder = self._root / "partial" / f"{manifest.digest}.directory"
        final = self._root / "versions" / manifest.digest
        for name, content in files.items():
            write_file(folder / name, content)
        try:
            if final.exists():  # damaged, or `get` would have found it
                shutil.rmtree(final)
            folder.rename(final)
            sync(final.parent)
            self.partial(manifest.digest).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"Cannot install release {manifest.label} in {final}: {error.strerror}. Check "
                "EDGE_DATA_DIR."
            ) from error
        return StoredRelease(manifest.digest, manifest, final)

    def differs(self, release: StoredRelease) -> str | None:
        """A file of the version directory that is not what central signed; None: all are.

        The manifest's digest is the release's id, which the caller has from central.
        """
        try:
            manifest = ReleaseManifest.from_bytes((release.path / "manifest.json").read_bytes())
            if manifest.digest != release.release_id:
                return "manifest.json"
            payload = (release.path / "payload.safetensors").read_bytes()
            if hashlib.sha256(payload).hexdigest() != manifest.payload.digest_sha256:
                return "payload.safetensors"
            if release.release_id not in self._digests:
                self._digests[release.release_id] = {
                    name: hashlib.sha256(content).hexdigest()
                    for name, content in self._files(payload)[1].items()
                }
            for name, digest in self._digests[release.release_id].items():
                if hashlib.sha256((release.path / name).read_bytes()).hexdigest() != digest:
                    return name
        except (OSError, ManifestError, LoraCodecError, AdapterError) as error:
            return f"{release.path.name} ({type(error).__name__})"
        return None

    def _files(self, payload: bytes) -> tuple[LoraTensors, dict[str, bytes]]:
        """The payload whole, and as the PEFT directory that this node serves.

        Raises LoraCodecError, AdapterError.
        """
        whole = decode(payload)
        served = (
            prefix(whole, min(whole.rank, self._max_rank)).tensors
            if whole.rank and self._max_rank
            else whole
        )
        return whole, peft_files(served, self._base.module_shapes)

    def _rank_fits(self, manifest: ReleaseManifest, folder: Path) -> bool:
        wanted = manifest.rank if self._max_rank is None else min(manifest.rank, self._max_rank)
        return min(manifest.rank, directory_rank(folder)) == wanted

    def activate(self, release: StoredRelease) -> None:
        """From now on a (re)started vLLM serves this release."""
        document = {
            "release_id": release.release_id,
            "label": release.label,
            "path": str(release.path.resolve()),
        }
        write_file(self._root / "active.json", json.dumps(document).encode())

    def active(self) -> StoredRelease | None:
        """The release that the alias points at, None before the first; raises StorageError."""
        path = self._root / "active.json"
        try:
            release_id = _text(path, "release_id")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path} cannot be read: {error}. Expected the release that the node serves. It "
                "is written anew as soon as central can be reached: check EDGE_CENTRAL__ADDRESS."
            ) from error
        return self.get(release_id)

    def keep_offer(self, offer_id: str, max_rank: int, encodings: Iterable[str] = ()) -> None:
        """Remember central's standing training offer for the learner."""
        document = {"offer_id": offer_id, "max_rank": max_rank, "encodings": list(encodings)}
        write_file(self._root / "offer.json", json.dumps(document).encode())

    def keep_standing(self, quarantine: str) -> None:
        """Remember why central keeps this node's updates aside; empty when it merges them."""
        try:
            known = self.quarantine()
        except StorageError:  # a damaged file is written anew
            known = None
        if quarantine != known:
            log.info("standing at central changed", extra={"quarantine": quarantine})
            write_file(
                self._root / "standing.json", json.dumps({"quarantine": quarantine}).encode()
            )

    def quarantine(self) -> str:
        """What central said last of why updates are kept aside; empty when they are merged."""
        try:
            return _text(self._root / "standing.json", "quarantine")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._root / 'standing.json'} cannot be read: {error}. Delete it; central says "
                "it again."
            ) from error

    def newest(self) -> list[StoredRelease]:
        """Versions on disk, last installed first; another thread may remove one meanwhile."""
        installed: dict[str, int] = {}
        for folder in (self._root / "versions").iterdir():
            with suppress(FileNotFoundError):
                installed[folder.name] = folder.stat().st_mtime_ns
        names = sorted(installed, key=installed.__getitem__, reverse=True)
        return [stored for name in names if (stored := self.get(name)) is not None]

    def remove(self, release: StoredRelease) -> None:
        """Delete a version directory; the caller made sure that nothing refers to it."""
        self._digests.pop(release.release_id, None)
        doomed = self._root / "partial" / f"{release.release_id}.directory"
        release.path.rename(doomed)
        shutil.rmtree(doomed)


def _text(path: Path, field: str) -> str:
    """Raises OSError, or LookupError, TypeError, ValueError for a damaged file."""
    value = read_json(path)[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} is {value!r}; expected a text")
    return value
