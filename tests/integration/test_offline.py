"""A real node without central, with an ended certificate and on a full disk: it serves on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.ports import free_port
from lorikeet.ballast import BALLAST
from tests.fakes import identity as identities
from tests.fakes.node_data import activate, make_node
from tests.fakes.tiny_model import tiny_adapter
from tests.integration.harness import ROOT, Program, is_ready, running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
CHAT = "/v1/chat/completions"
QUESTION: dict[str, Any] = {
    "model": "lorikeet",
    "messages": [{"role": "user", "content": "w1 w2 w3"}],
    "max_tokens": 4,
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A file system of 48 MiB at a short path."""
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        command = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", directory]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a file system")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


def fill(place: Path) -> None:
    """Leave not a byte."""
    for piece in (1 << 16, 1 << 10, 1):
        with (place / "filler").open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(piece))


def status(node: Program) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Exit code, the document, and the problems' texts by room."""
    done = subprocess.run(
        [sys.executable, "-m", node.module, "status", "--json"],
        env=node.environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1, 7), done.stderr
    document = json.loads(done.stdout)
    problems = {one["room"]: one["text"] for one in document["problems"]}
    return done.returncode, document, problems


def test_a_node_without_central_certificate_and_disk_serves_its_last_good_release(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(identities, "LIFETIME", timedelta(seconds=1))
    settings = make_node(place / "node")
    served = f"lorikeet@{activate(settings, tiny_adapter(1), 1).label}"
    port = free_port()
    node = Program(
        "edge_node.cli",
        {
            "EDGE_DATA_DIR": str(settings.data_dir),
            "EDGE_BASE__PATH": str(settings.base.path),
            "EDGE_CENTRAL__ADDRESS": f"localhost:{free_port()}",
            "EDGE_SERVING__PORT": str(port),
        },
        tmp_path / "node.log",
    )
    url = f"http://127.0.0.1:{port}"
    with running(node, "serve"):
        wait_for("a ready node", lambda: is_ready(url), 180, tmp_path)
        wait_for("room for the next start", (settings.data_dir / BALLAST).exists, 30)
    fill(place)
    with running(node, "serve"):
        wait_for("a ready node on a full disk", lambda: is_ready(url), 180, tmp_path)
        fill(place)
        answer = httpx.post(f"{url}{CHAT}", json=QUESTION, timeout=60)
        assert (answer.status_code, answer.json()["model"]) == (200, served)
        wait_for("central's absence", lambda: "central" in status(node)[2], 30)
        code, document, problems = status(node)
        assert (code, document["ready"], document["serving"]) == (7, True, served)
        assert document["active_release"] == served.partition("@")[2]
        assert "Connection refused" in problems["central"]
        assert "MiB free" in problems["disk"]
        assert "and this node's clock says" in problems["certificate"]
        # vLLM is killed there, and starts again with the same release.
        [vllm] = children(node, "edge_node.serving.vllm_entry")
        os.kill(vllm, signal.SIGKILL)
        wait_for("vLLM's end", lambda: not is_ready(url), 30)
        refused = httpx.post(f"{url}{CHAT}", json=QUESTION, timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        wait_for("another vLLM on a full disk", lambda: is_ready(url), 180, tmp_path)
        answer = httpx.post(f"{url}{CHAT}", json=QUESTION, timeout=60)
        assert (answer.status_code, answer.json()["model"]) == (200, served)
        (place / "filler").unlink()
        before = status(node)[1]["captured"]
        wait_for(
            "answers to be kept again",
            lambda: (
                httpx.post(f"{url}{CHAT}", json=QUESTION, timeout=60).is_success
                and status(node)[1]["captured"] > before
            ),
            60,
        )
        wait_for("a disk that is well", lambda: "capture" not in status(node)[2], 60)


def children(node: Program, name: str) -> list[int]:
    """Processes of the supervisor with `name` in their command line."""
    assert node.process is not None
    found = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    return [int(pid) for pid in found if name in Path(f"/proc/{pid}/cmdline").read_text()]
