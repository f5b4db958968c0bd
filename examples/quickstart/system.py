"""The quickstart's system: one central and its edge nodes, started with the usual commands.

In: an empty directory, the base model, and which nodes. Out: running processes, their addresses,
and the commands to look at them. Guarantees: everything listens on 127.0.0.1 on free ports; each
node has a data directory of its own; `start` returns when central answers, `wait_ready` when a node
serves.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from examples.ports import free_ports
from examples.quickstart.environments import Node
from examples.quickstart.operator_view import OperatorView
from examples.quickstart.processes import (
    Child,
    ChildFailed,
    ProcessTable,
    child_environment,
)
from examples.quickstart.world import NodePlan, Size, World

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = REPOSITORY / ".venv" / "bin"
ALIAS = "lorikeet"
CENTRAL_START_TIMEOUT_S = 60.0
NODE_START_TIMEOUT_S = 420.0


class System:
    """Central and its nodes as child processes."""

    def __init__(
        self,
        world: World,
        root: Path,
        base: Path,
        size: Size,
        seed: int,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        """`overrides`: further CENTRAL_* or EDGE_* settings, for every process that has them."""
        self.world = world
        self.root = root
        self.plans = tuple(world.nodes[key] for key in size.nodes)
        self.size = size
        self.seed = seed
        self._overrides = dict(overrides or {})
        self._base = base
        for folder in ("logs", "nodes"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.central_port, self._enrollment_port, *ports = free_ports(2 + len(self.plans))
        self.ports = {plan.key: port for plan, port in zip(self.plans, ports, strict=True)}
        self.table = ProcessTable(root / "processes.json")
        self.central = Child(
            "central",
            [str(BIN / "central"), "serve"],
            self.central_environment(),
            *self._log("central"),
        )
        self.nodes: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def url(self, key: Node) -> str:
        """A node's public endpoint, without /v1."""
        return f"http://127.0.0.1:{self.ports[key]}"

    def node_dir(self, key: Node) -> Path:
        return self.root / "nodes" / self.world.nodes[key].name

    def operator(self) -> OperatorView:
        return OperatorView(f"localhost:{self.central_port}", self.root / "central" / "pki")

    async def start(self) -> None:
        """Start central, make one join token a cohort, start the nodes; raises ChildFailed."""
        self._tasks.append(asyncio.create_task(self.central.run(self.table), name="central"))
        await self._wait_for_port(self.central_port)
        self.central.was_ready = True
        tokens = {}
        for cohort in sorted({plan.cohort for plan in self.plans}):
            uses = sum(plan.cohort == cohort for plan in self.plans)
            answer = await self.central_cli(
                "tokens", "create", "--cohort", cohort, "--uses", str(uses), "--json"
            )
            tokens[cohort] = answer["token"]
        for plan in self.plans:
            environment = self.node_environment(plan, tokens[plan.cohort])
            child = Child(
                f"node-{plan.name}",
                [str(BIN / "edge-node"), "serve"],
                environment,
                *self._log(f"node-{plan.name}"),
            )
            self.nodes[plan.key] = child
            self._tasks.append(asyncio.create_task(child.run(self.table), name=child.name))

    async def wait_ready(self, key: Node) -> None:
        """Until the node answers GET /ready with 200; raises ChildFailed."""
        async with httpx.AsyncClient(timeout=5) as client:
            for _ in range(int(NODE_START_TIMEOUT_S / 0.5)):
                self.check()
                try:
                    if (await client.get(f"{self.url(key)}/ready")).status_code == httpx.codes.OK:
                        self.nodes[key].was_ready = True
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.5)
        child = self.nodes[key]
        raise ChildFailed(
            f"{child.name} was not ready after {NODE_START_TIMEOUT_S:.0f} s. "
            f"The end of {child.log}:\n{child.log_end()}"
        )

    def check(self) -> None:
        """Raises what ended a child for good."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    @property
    def children(self) -> list[Child]:
        return [self.central, *self.nodes.values()]

    async def stop(self) -> None:
        """Nodes first, then central."""
        await asyncio.gather(*(child.stop() for child in self.nodes.values()))
        await self.central.stop()
        await self.release()
        self.table.path.unlink(missing_ok=True)

    async def release(self) -> None:
        """Stop watching the children, and leave them running."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def central_cli(self, *arguments: str) -> Any:
        """Run `central ARGUMENTS` as the operator would and parse its JSON."""
        return await _run_json([str(BIN / "central"), *arguments], self.central.environment)

    async def node_cli(self, key: Node, *arguments: str) -> Any:
        """Run `edge-node ARGUMENTS` on the node and parse its JSON."""
        return await _run_json([str(BIN / "edge-node"), *arguments], self.nodes[key].environment)

    def central_environment(self) -> dict[str, str]:
        settings = {
            "CENTRAL_DATA_DIR": str(self.root / "central"),
            "CENTRAL_BASE__PATH": str(self._base),
            "CENTRAL_LISTEN__PORT": str(self.central_port),
            "CENTRAL_LISTEN__ENROLLMENT_PORT": str(self._enrollment_port),
            **self.world.central,
            **{key: value for key, value in self._overrides.items() if key.startswith("CENTRAL_")},
        }
        return child_environment(settings, REPOSITORY)

    def node_environment(self, plan: NodePlan, join_token: str) -> dict[str, str]:
        environments = [self.world.own(plan, self.seed), self.world.anchor(self.seed)]
        if self.world.texts is not None:
            environments.append(self.world.texts)
        settings = {
            "EDGE_DATA_DIR": str(self.node_dir(plan.key)),
            "EDGE_NODE_NAME": plan.name,
            "EDGE_BASE__PATH": str(self._base),
            "EDGE_CENTRAL__ADDRESS": f"localhost:{self.central_port}",
            "EDGE_CENTRAL__ENROLLMENT_ADDRESS": f"localhost:{self._enrollment_port}",
            "EDGE_CENTRAL__JOIN_TOKEN": join_token,
            "EDGE_SERVING__PORT": str(self.ports[plan.key]),
            "EDGE_SERVING__ALIAS": ALIAS,
            "EDGE_ENVIRONMENTS": json.dumps([spec.model_dump() for spec in environments]),
            "EDGE_LEARNING__ENABLED": str(plan.learns).lower(),
            "EDGE_LEARNING__SEED": str(self.seed),
            **self.world.edge(self.size, plan.cohort),
            **{key: value for key, value in self._overrides.items() if key.startswith("EDGE_")},
        }
        return child_environment(settings, REPOSITORY)

    def how_to_use(self) -> str:
        """Commands to query a node and to ask central, for a system that was left running."""
        first = self.plans[0]
        central = " ".join(
            f"{key}={shlex.quote(value)}"
            for key, value in self.central.environment.items()
            if key in ("CENTRAL_DATA_DIR", "CENTRAL_LISTEN__PORT")
        )
        prompt = self.world.example_prompt
        body = json.dumps(
            {"model": ALIAS, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        )
        bin_dir = BIN.relative_to(REPOSITORY)
        nodes = "\n".join(
            f"  node {plan.key} ({plan.environment:7} cohort {plan.cohort}): {self.url(plan.key)}"
            for plan in self.plans
        )
        return f"""The system is still running.
{nodes}

Ask node {first.key} with curl:
  curl -s {self.url(first.key)}/v1/chat/completions -H 'content-type: application/json' \\
    -d {shlex.quote(body)}
Tell it what the answer should have been (ID is the answer's id):
  curl -s {self.url(first.key)}/v1/feedback -H 'content-type: application/json' \\
    -d '{{"id": "ID", "correction": "..."}}'

The same with the openai client ({bin_dir}/python):
  from openai import OpenAI
  client = OpenAI(base_url="{self.url(first.key)}/v1", api_key="none")
  answer = client.chat.completions.create(
      model="{ALIAS}", temperature=0,
      messages=[{{"role": "user", "content": {json.dumps(prompt)}}}])
  print(answer.model, answer.choices[0].message.content)

Ask central what happened:
  export {central}
  {bin_dir}/central nodes
  {bin_dir}/central releases list
  {bin_dir}/central updates
  {bin_dir}/central events
Go back one release (requeue: its updates wait again; set-aside: they are kept, but not merged):
  {bin_dir}/central releases rollback --cohort {first.cohort} --updates set-aside

Stop it: make stop"""

    def _log(self, name: str) -> tuple[Path, Path]:
        return self.root / "logs" / f"{name}.log", REPOSITORY

    async def _wait_for_port(self, port: int) -> None:
        for _ in range(int(CENTRAL_START_TIMEOUT_S / 0.1)):
            self.check()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            return
        raise ChildFailed(
            f"Central did not listen on port {port} after {CENTRAL_START_TIMEOUT_S:.0f} s:\n"
            f"{self.central.log_end()}"
        )


async def _run_json(command: Sequence[str], environment: Mapping[str, str]) -> Any:
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        env=dict(environment),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command[:4])} ended with {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout)
