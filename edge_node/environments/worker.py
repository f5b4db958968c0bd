"""`python -m edge_node.environments.worker`: one environment, in a process of its own.

In: an EnvironmentSpec on stdin; a socket of its parent, one request a line. Out: one reply a line,
in the same order, the first one when the environment is loaded. Guarantees: it dies with its parent
and keeps its limits. It answers with the kind and the place of an exception, never with its words.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from edge_node.environments.agent_loop import AgentLoop
from edge_node.environments.contract import (
    Environment,
    PlugIn,
    TextEnvironment,
    ToolEnvironment,
)
from edge_node.environments.loader import load_environment
from edge_node.environments.tools import OpenEpisodes, tool_schemas
from edge_node.environments.wire import (
    ContractBroken,
    open_task,
    plain_answer,
    plain_documents,
    plain_outcome,
    plain_tasks,
)
from edge_node.errors import SettingsError
from edge_node.settings import EnvironmentSpec
from lorikeet.parent import die_with_parent

Reply = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m edge_node.environments.worker", description=__doc__.splitlines()[0]
    )
    for name in ("--parent", "--socket"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    spec = EnvironmentSpec.model_validate_json(sys.stdin.buffer.read())
    # Private writable memory: unlike the address space it has no libraries and reservations in it.
    memory, (_, most) = spec.memory_mb << 20, resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:  # only root may raise what the node was given
        memory = min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file holds prompts
    os.set_inheritable(options.socket, False)
    with socket.socket(fileno=options.socket) as link, link.makefile("rb") as requests:
        _serve(spec, requests, lambda reply: link.sendall(json.dumps(reply).encode() + b"\n"))


def _serve(spec: EnvironmentSpec, requests: Any, send: Callable[[Reply], None]) -> None:
    try:
        environment = load_environment(spec)
        schemas = tool_schemas(environment) if isinstance(environment, ToolEnvironment) else []
    except SettingsError as error:
        if isinstance(error.__cause__, MemoryError):
            send({"ends": _needs_memory(spec, "load")})
        else:
            send({"ends": str(error), "mistake": True})
        return
    except ContractBroken as error:
        text = f"Environment {spec.name!r}: factory {spec.factory!r} made one that {error}"
        send({"ends": text, "mistake": True})
        return
    send({"value": _kind(environment)})
    episodes = OpenEpisodes(
        lambda: cast(ToolEnvironment, load_environment(spec)),
        [schema["function"]["name"] for schema in schemas],
    )
    agent_loop = AgentLoop(spec.run_timeout_s, _where)
    worker = os.getpid()
    for line in requests:
        request = json.loads(line)
        method = request.pop("method")
        if method == "tools":
            reply: Reply = {"value": schemas}
        elif method == "run_all":
            reply = _replying(spec, method, partial(agent_loop.run_all, environment, request))
        elif "episode" in request:
            reply = _replying(spec, method, partial(_of_episode, episodes, method, request))
        else:
            reply = _replying(spec, method, partial(_of_environment, environment, method, request))
        if os.getpid() != worker:  # a fork of the plug-in's came back; a second reply is the next
            os._exit(1)
        send(reply)
        if "ends" in reply:
            return


def _kind(environment: PlugIn) -> str:
    if isinstance(environment, TextEnvironment):
        return "texts"
    if isinstance(environment, ToolEnvironment):
        return "tools"
    return "tasks" if isinstance(environment, Environment) else "agents"


def _of_environment(environment: PlugIn, method: str, given: Any) -> Reply:
    if isinstance(environment, TextEnvironment):
        read = environment.documents(given["split"], count=given["count"], seed=given["seed"])
        return {"value": plain_documents(read, given["count"])}
    if method == "tasks":
        made = environment.tasks(given["split"], count=given["count"], seed=given["seed"])
        return {"value": plain_tasks(made, given["count"])}
    assert isinstance(environment, Environment)
    task = open_task(given["task"])
    if method == "verify":
        return {"value": plain_outcome(environment.verify(task, given["answer"]))}
    return {"value": plain_answer(environment.reference_answer(task))}


def _of_episode(episodes: OpenEpisodes, method: str, given: Any) -> Reply:
    number: int = given["episode"]
    if method == "reset":
        return {"value": episodes.reset(number, open_task(given["task"]))}
    if number not in episodes:  # it was another worker's
        return {"lost": True}
    if method == "call":
        return {"value": episodes.call(number, given["tool"], given["arguments"])}
    if method == "get_reward":
        return {"value": episodes.reward(number)}
    if method == "feedback":
        return {"value": episodes.feedback(number)}
    episodes.end(number)
    return {"value": None}


def _replying(spec: EnvironmentSpec, method: str, reply: Callable[[], Reply]) -> Reply:
    try:
        return reply()
    except ContractBroken as error:
        return {"ends": f"broke its contract in {method}: it {error}"}
    except MemoryError:
        return {"ends": _needs_memory(spec, method)}
    except Exception as error:  # a plug-in may raise anything
        return {"raised": f"{type(error).__name__} in {method}{_where(error)}"}


def _needs_memory(spec: EnvironmentSpec, method: str) -> str:
    return (
        f"needed more than {spec.memory_mb} MiB of memory in {method}. Raise its memory_mb in "
        "EDGE_ENVIRONMENTS, or let it need less."
    )


def _where(error: Exception) -> str:
    """File and line of the raise, which quote no task."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


if __name__ == "__main__":
    main()
