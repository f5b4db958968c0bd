"""The worker of a bare vLLM on CPU: the node's arithmetic of adapters, and nothing else of a node.

vLLM's own is up to 20 times slower on CPU (`benchmarks.cpu_adapters`), so a comparison with it
would say nothing about the gateway.
"""

from __future__ import annotations

from edge_node.serving.cpu_worker import CpuWorker
from edge_node.serving.guard import replace_cpu_lora

replace_cpu_lora()
BareWorker = CpuWorker
"""What `--worker-cls` names."""
