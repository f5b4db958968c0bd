"""What intake is compared with: the same gRPC stream over the same TLS, counted and forgotten, or stored and nothing else.

In: central's certificates and a port. Out: the same answers, without a receipt's meaning. `Bare` keeps nothing. `Storing` does with the bytes
what intake does, in the same windows: SHA-256, sums of squares, O_DIRECT, fsync; it has no manifest, no journal and no limits.
Run: `python -m benchmarks.load.streams bare|storing PKI PORT FOLDER`.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from central.intake.direct import WINDOW_BYTES, DirectFile, Windows
from central.intake.service import THREADS
from central.intake.values import FLOAT_BYTES, SUM_VALUES
from central.rpc import SERVER_OPTIONS, bound_heaps
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

Requests = AsyncIterator[updates_pb2.UploadRequest]


class Bare(updates_pb2_grpc.UpdateServiceServicer):
    """gRPC alone, with its own defaults."""

    options = (("grpc.so_reuseport", 0),)

    def __init__(self, folder: Path) -> None:
        """Keeps nothing in `folder`."""

    async def Upload(self, request_iterator: Requests, context: Any) -> updates_pb2.UploadResponse:
        size = 0
        async for request in request_iterator:
            size += len(request.chunk)
        return _answer(size)


class Storing(updates_pb2_grpc.UpdateServiceServicer):
    """The bytes on disk and their digest, with central's settings of gRPC and as many threads."""

    options = SERVER_OPTIONS

    def __init__(self, folder: Path) -> None:
        """Writes one file per upload into `folder`."""
        bound_heaps()
        self._folder = folder
        self._numbers = count()
        self._windows = Windows()
        self._threads = ThreadPoolExecutor(THREADS)

    async def Upload(self, request_iterator: Requests, context: Any) -> updates_pb2.UploadResponse:
        run = asyncio.get_running_loop().run_in_executor
        file, digest = DirectFile(self._folder / str(next(self._numbers))), hashlib.sha256()
        window, size = self._windows.borrow(), 0

        def store(end: int) -> None:
            begin = (end - 1) // WINDOW_BYTES * WINDOW_BYTES
            data = window[: end - begin]
            file.write(data, begin)
            digest.update(data)
            values = np.frombuffer(data, np.float32, len(data) // FLOAT_BYTES)
            for first in range(0, len(values), SUM_VALUES):
                piece = values[first : first + SUM_VALUES]
                np.einsum("i,i->", piece, piece)

        def end() -> None:
            if size % WINDOW_BYTES:
                store(size)
            file.sync()
            file.close()
            self._windows.give_back(window)

        async for request in request_iterator:
            rest = memoryview(request.chunk)
            while rest:
                at = size % WINDOW_BYTES
                piece, rest = rest[: WINDOW_BYTES - at], rest[WINDOW_BYTES - at :]
                window[at : at + len(piece)] = piece
                size += len(piece)
                if size % WINDOW_BYTES == 0:
                    await run(self._threads, store, size)
        await run(self._threads, end)
        return _answer(size)


def _answer(size: int) -> updates_pb2.UploadResponse:
    return updates_pb2.UploadResponse(receipt=updates_pb2.Receipt(body=str(size).encode()))


async def serve(kind: type[Bare | Storing], pki: Path, port: int, folder: Path) -> None:
    """Until killed; the first line on stdout says that it listens."""
    server = grpc.aio.server(options=kind.options)
    updates_pb2_grpc.add_UpdateServiceServicer_to_server(kind(folder), server)
    pair = ((pki / "server.key").read_bytes(), (pki / "server.pem").read_bytes())
    ca = (pki / "ca.pem").read_bytes()
    server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair], ca, require_client_auth=True))
    await server.start()
    print("listening", flush=True)
    await server.wait_for_termination()


KINDS: dict[str, type[Bare | Storing]] = {"bare": Bare, "storing": Storing}

if __name__ == "__main__":
    asyncio.run(serve(KINDS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
