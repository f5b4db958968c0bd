"""Ports for servers of tests and scripts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from examples import ports
from examples.ports import free_port, free_ports

ROOT = Path(__file__).resolve().parents[3]
ASK = "import json; from examples.ports import free_ports; print(json.dumps(free_ports(20)))"


def test_ports_are_distinct() -> None:
    assert len(set(free_ports(20)) | {free_port() for _ in range(20)}) == 40


def test_another_process_gets_others() -> None:
    ours = set(free_ports(20))
    made = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not ours & set(json.loads(made.stdout))


def test_the_kernel_gives_none_of_them_to_a_connection() -> None:
    assert max(free_ports(20)) < ports._lowest_ephemeral()


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    taken = free_port() + 1
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        other.listen()
        assert taken not in free_ports(3)
