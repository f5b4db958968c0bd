"""Download of release payloads with resume.

In: a signed manifest. Out: an installed version directory. A cut download goes on at the byte it
has, after a restart too; a payload whose digest does not fit is thrown away and fetched once more
from the start.
"""

from __future__ import annotations

import asyncio
import logging
import os

import grpc

from edge_node.errors import AdapterError
from edge_node.releases.store import ReleaseStore, StoredRelease
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

log = logging.getLogger(__name__)


async def fetch_release(
    channel: grpc.aio.Channel,
    store: ReleaseStore,
    signed: releases_pb2.SignedManifest,
    timeout_s: float,
) -> StoredRelease:
    """The version on disk, downloaded if it is not there yet.

    Raises:
        AdapterError: the manifest or, twice, the payload is not usable.
        grpc.aio.AioRpcError: central could not be reached; what came is kept for the next try.
    """
    manifest = store.check(signed)
    stored = store.get(manifest.digest)
    if stored is not None:
        return stored
    partial = store.partial(manifest.digest)
    for attempt in (1, 2):
        await _download(channel, manifest.digest, manifest.payload.size_bytes, partial, timeout_s)
        payload = await asyncio.to_thread(partial.read_bytes)
        try:
            return await asyncio.to_thread(store.install, signed, payload)
        except AdapterError:
            partial.unlink(missing_ok=True)
            if attempt == 2:
                raise
            log.warning(
                "downloaded payload is not usable; fetching it again",
                extra={"release": manifest.label},
            )
    raise AssertionError("unreachable")


async def _download(
    channel: grpc.aio.Channel,
    release_id: str,
    size: int,
    partial: os.PathLike[str],
    timeout_s: float,
) -> None:
    stub = releases_pb2_grpc.ReleaseServiceStub(channel)
    with open(partial, "ab") as stream:
        if stream.tell() > size:
            stream.truncate(0)
        if stream.tell() == size:
            return
        call = stub.Download(
            releases_pb2.DownloadRequest(release_id=release_id, offset=stream.tell())
        )
        while True:
            # The deadline limits silence, not the whole payload: a slow link may finish.
            answer = await asyncio.wait_for(call.read(), timeout_s)
            if not isinstance(answer, releases_pb2.DownloadResponse):  # end of the stream
                return
            stream.write(answer.chunk)
            if stream.tell() > size:
                call.cancel()
                return
