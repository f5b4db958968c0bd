"""Blob stores: bytes enter and leave, found by their SHA-256, on a disk or in an object store."""

from central.blobs.directory import DirectoryBlobs
from central.blobs.opening import open_blobs
from central.blobs.store import BlobLost, BlobStore

__all__ = ["BlobLost", "BlobStore", "DirectoryBlobs", "open_blobs"]
