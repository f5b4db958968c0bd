"""Retention: blobs that nothing needs are deleted, each with its reason in the journal."""
