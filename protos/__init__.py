"""What crosses the wire: gRPC services, signed manifests and the LoRA codec."""
