"""Releases: signed manifests and payloads come in from central; a served version and evaluation reports go out."""
