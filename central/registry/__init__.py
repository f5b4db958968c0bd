"""The registry: candidates enter, signed and immutable releases, channels and their payloads leave."""

from central.registry.blobs import BlobLost, BlobStore
from central.registry.directory import DirectoryBlobs
from central.registry.open import open_blobs
from central.registry.registry import Registry

__all__ = ["BlobLost", "BlobStore", "DirectoryBlobs", "Registry", "open_blobs"]
