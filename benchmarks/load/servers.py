"""The two servers that `benchmarks.serving` compares: a node's vLLM, and vLLM alone.

In: a node's settings and an adapter. Out: running servers; both have the same model, adapter,
precision, cache and worker. Guarantee: both are stopped at the end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from edge_node.serving import ControlClient, VllmProcess, control_socket
from edge_node.serving.command import MIDDLEWARE, runs_on_cpu, serving_command, serving_environment
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from protos.base import BaseModelInfo

START_S = 180.0


@asynccontextmanager
async def node_server(
    settings: EdgeSettings, base: BaseModelInfo
) -> AsyncIterator[tuple[ControlClient, int]]:
    """The node's vLLM under its supervisor: its control client and process id."""
    socket_path = control_socket(settings.data_dir)
    vllm = VllmProcess(settings, base, socket_path)
    running = asyncio.create_task(vllm.run())
    try:
        await vllm.wait_ready()
        assert vllm.pid is not None
        yield ControlClient(socket_path), vllm.pid
    finally:
        await vllm.aclose()
        await running


@asynccontextmanager
async def bare_server(
    settings: EdgeSettings, base: BaseModelInfo, name: str, adapter: Path, log: Path
) -> AsyncIterator[tuple[str, int]]:
    """vLLM with the same arguments, but without our middleware and plug-ins: URL and process id."""
    port, on_cpu = free_port(), runs_on_cpu()
    command = serving_command(settings, base, on_cpu=on_cpu)
    for ours in MIDDLEWARE:
        place = command.index(ours)
        del command[place - 1 : place + 1]
    command[command.index("--port") + 1] = str(port)
    if on_cpu:
        command[command.index("--worker-cls") + 1] = "benchmarks.load.bare_worker.BareWorker"
    command += ["--lora-modules", f"{name}={adapter}"]
    environment = serving_environment(
        settings, control_socket(settings.data_dir), os.environ, command=command, on_cpu=on_cpu
    ) | {"VLLM_PLUGINS": ""}
    del environment["PYTHONSAFEPATH"]  # the worker is a module of this checkout
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=file, stderr=file
        )
    try:
        await _wait_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _wait_ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with httpx.AsyncClient() as http, asyncio.timeout(START_S):
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-3000:]}")
            try:
                if (await http.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and its children so far."""
    times = [each.cpu_times() for each in _tree(pid)]
    return sum(float(each.user + each.system) for each in times)


def memory_mb(pid: int) -> float:
    """Resident memory of a process and its children, in MB."""
    return sum(float(each.memory_info().rss) for each in _tree(pid)) / 1e6


def _tree(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]
