"""The node's public port, seen from the node itself.

In: the serving settings. Out: what keeps vLLM from starting or from opening the port, and whether
it is open. Guarantees: nothing is asked over it, so that neither TLS nor an API key matters.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import tempfile
import uuid

from edge_node import vllm_arguments
from edge_node.serving.client import MAX_SOCKET_PATH_BYTES
from edge_node.serving_settings import ServingSettings

CONNECT_TIMEOUT_S = 1.0
MAX_TEMPORARY_BYTES = MAX_SOCKET_PATH_BYTES - len("/") - len(str(uuid.UUID(int=0)))
"""vLLM's processes talk over sockets that are named by a UUID."""


def port_problem(serving: ServingSettings) -> str | None:
    """Why vLLM could not listen now, on the endpoint or for its metrics; None when it could."""
    problem = _listening_problem(serving.host, serving.port, "")
    if problem is None and serving.metrics_port is not None:
        problem = _listening_problem(serving.metrics_host, serving.metrics_port, "METRICS_")
    return problem


def _listening_problem(host: str, port: int, of: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return (
                f"Port {port} on {host} is taken. "
                f"Stop what listens there, or set EDGE_SERVING__{of}PORT to a free port."
            )
        return (
            f"Cannot listen on {host}:{port}: {error}. "
            f"Set EDGE_SERVING__{of}HOST to an address of this machine."
        )
    return None


def start_problem(serving: ServingSettings) -> str | None:
    """What would end vLLM's start after it has loaded the model; None when nothing is seen."""
    return _key_problem() or _tls_problem(serving) or _temporary_problem()


def _key_problem() -> str | None:
    # Of two keys in one header only one can be right, and a client has to know which.
    if not os.environ.get("VLLM_API_KEY"):
        return None
    return (
        "VLLM_API_KEY is set, and this node checks access keys of its own. Unset it; make a key "
        "for each client with `edge-node keys create NAME`, and set EDGE_SERVING__ACCESS=required."
    )


def _temporary_problem() -> str | None:
    folder = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    size = len(os.fsencode(folder))
    if size <= MAX_TEMPORARY_BYTES:
        return None
    return (
        f"The temporary directory {folder} has {size} bytes; vLLM's own Unix sockets in it allow "
        f"{MAX_TEMPORARY_BYTES}. Set TMPDIR, or VLLM_RPC_BASE_PATH, to a shorter one."
    )


def _tls_problem(serving: ServingSettings) -> str | None:
    certificate, key = serving.tls.cert_file, serving.tls.key_file
    if certificate is None:
        return None
    clients = vllm_arguments.value(serving.extra_args, "--ssl-ca-certs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # empty: no question on the terminal
        if clients is not None:
            context.load_verify_locations(clients)
    except OSError as error:
        return (
            "vLLM cannot use the TLS files "
            f"{', '.join(str(file) for file in (certificate, key, clients) if file)}: {error}. "
            "Expected PEM files that this user can read, and a key without a password that fits "
            "the certificate (EDGE_SERVING__TLS__CERT_FILE, EDGE_SERVING__TLS__KEY_FILE)."
        )
    return None


async def is_listening(serving: ServingSettings) -> bool:
    """Does the port take connections?"""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(serving.reached_at, serving.port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True
