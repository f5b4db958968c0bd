"""What crosses the wire between node and central: gRPC services, signed manifests and the LoRA codec."""
