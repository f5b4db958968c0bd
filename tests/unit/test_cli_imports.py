"""`--help` of both programs answers without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "vllm", "transformers", "flwr", "peft", "trl"}

PROGRAM = """
import runpy, sys
sys.argv = ["{module}", "--help"]
try:
    runpy.run_module("{module}", run_name="__main__")
except SystemExit as exit:
    code = exit.code or 0
print("\\n@@" + " ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("module", "command"), [("edge_node.cli", "serve"), ("central.cli", "serve")]
)
def test_help_is_light(module: str, command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    text, _, modules = answer.stdout.partition("\n@@")
    assert command in text
    assert "typer" in modules.split()
    assert HEAVY.isdisjoint(modules.split()), (
        f"{module} --help imports {sorted(HEAVY & set(modules.split()))}"
    )
