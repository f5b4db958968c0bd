"""Releases: manifests and payloads enter; a served version and evaluation reports leave."""
