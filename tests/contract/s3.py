"""An S3 for tests: moto's server on 127.0.0.1, gone afterwards.

In: nothing. Out: the options with which fsspec reaches it, and a bucket that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BUCKET = "lorikeet"


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    endpoint: str
    key: str = "test-key"
    secret: str = "test-secret"

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret}

    @property
    def files(self) -> Any:
        """A client that sees what other clients wrote."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def running_s3() -> Iterator[S3]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = S3(f"http://{host}:{port}")
        s3.files.mkdir(BUCKET)
        yield s3
    finally:
        server.stop()
