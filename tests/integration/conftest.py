"""The real programs that several integration tests run: central and one node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.ports import free_port
from tests.fakes.otlp import Collector
from tests.fakes.tiny_model import tiny_model
from tests.integration.harness import Program, running, wait_for

ENVIRONMENTS = [
    {"name": "words", "factory": "tests.fakes.word_environment:NextWord"},
    {
        "name": "anchor",
        "factory": "tests.fakes.word_environment:NextWord",
        "options": {"first": 100, "last": 200},
        "anchor": True,
    },
]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Gets the traces of both programs."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def central(tmp_path: Path, collector: Collector) -> Iterator[Program]:
    """`central serve`, ready; a file that needs another one makes its own."""
    port, enrollment_port = free_port(), free_port()
    program = Program(
        "central.cli",
        {
            "CENTRAL_DATA_DIR": str(tmp_path / "central"),
            "CENTRAL_BASE__PATH": str(tiny_model()),
            "CENTRAL_LISTEN__PORT": str(port),
            "CENTRAL_LISTEN__ENROLLMENT_PORT": str(enrollment_port),
            "CENTRAL_LISTEN__METRICS_PORT": str(free_port()),
            "CENTRAL_TRACES__ENDPOINT": collector.address,
            "CENTRAL_MERGE__MIN_UPDATES": "1",
            "CENTRAL_MERGE__RANK": "16",
            "CENTRAL_GATE__TASKS": "8",
            "CENTRAL_GATE__MAX_TASKS": "16",
        },
        tmp_path / "central.log",
    )
    with running(program, "serve"):
        wait_for("central", lambda: "central is ready" in program.log.read_text(), 60, tmp_path)
        yield program


@pytest.fixture
def node(central: Program, tmp_path: Path, collector: Collector) -> Iterator[Program]:
    """`edge-node serve` of that central, started; it loads vLLM."""
    ports = {
        name: central.settings[f"CENTRAL_LISTEN__{name}"] for name in ("PORT", "ENROLLMENT_PORT")
    }
    token = central.json("tokens", "create", "--cohort", "shared")["token"]
    program = Program(
        "edge_node.cli",
        {
            "EDGE_DATA_DIR": str(tmp_path / "node"),
            "EDGE_NODE_NAME": "n1",
            "EDGE_BASE__PATH": str(tiny_model()),
            "EDGE_CENTRAL__ADDRESS": f"localhost:{ports['PORT']}",
            "EDGE_CENTRAL__ENROLLMENT_ADDRESS": f"localhost:{ports['ENROLLMENT_PORT']}",
            "EDGE_CENTRAL__JOIN_TOKEN": token,
            "EDGE_SERVING__PORT": str(free_port()),
            "EDGE_SERVING__MAX_LORA_RANK": "32",
            "EDGE_ENVIRONMENTS": json.dumps(ENVIRONMENTS),
            "EDGE_LEARNING__MIN_EXAMPLES": "16",
            "EDGE_LEARNING__STEPS": "6",
            "EDGE_LEARNING__BATCH_OWN": "4",
            "EDGE_LEARNING__BATCH_ANCHOR": "2",
            "EDGE_LEARNING__ANCHOR_POOL": "20",
            "EDGE_LEARNING__CHECKPOINT_STEPS": "2",
            "EDGE_OUTBOX__APPROVAL": "manual",
            "EDGE_TRACES__ENDPOINT": collector.address,
            "EDGE_TRACES__SAMPLE": "1",
        },
        tmp_path / "node.log",
    )
    with running(program, "serve"):
        yield program
