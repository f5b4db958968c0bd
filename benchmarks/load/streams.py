"""What intake is compared with: the same gRPC stream over the same TLS, counted and forgotten.

In: central's certificates and a port. Out: the same answers, without a receipt's meaning.
Run: `python -m benchmarks.load.streams PKI PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from protos.updates.v1 import updates_pb2, updates_pb2_grpc

OPTIONS = (("grpc.so_reuseport", 0),)
"""gRPC's defaults otherwise."""


class Bare(updates_pb2_grpc.UpdateServiceServicer):
    """gRPC alone."""

    async def Upload(
        self, request_iterator: AsyncIterator[updates_pb2.UploadRequest], context: Any
    ) -> updates_pb2.UploadResponse:
        size = 0
        async for request in request_iterator:
            size += len(request.chunk)
        receipt = updates_pb2.Receipt(body=str(size).encode())
        return updates_pb2.UploadResponse(receipt=receipt)


async def serve(pki: Path, port: int) -> None:
    """Until killed; the first line on stdout says that it listens."""
    server = grpc.aio.server(options=OPTIONS)
    updates_pb2_grpc.add_UpdateServiceServicer_to_server(Bare(), server)
    pair = ((pki / "server.key").read_bytes(), (pki / "server.pem").read_bytes())
    ca = (pki / "ca.pem").read_bytes()
    server.add_secure_port(
        f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair], ca, require_client_auth=True)
    )
    await server.start()
    print("listening", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
