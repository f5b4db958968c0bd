"""Backup and restore: a journal and its blobs enter; a backup leaves, or a restored central."""
