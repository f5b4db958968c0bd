"""What vLLM's process knows of the node's settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import edge_node
from edge_node.experience import open_experience
from edge_node.serving import command
from edge_node.settings import EdgeSettings


def test_vllm_gets_every_setting_that_the_plug_in_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the key file, what vLLM's process keeps would not be sealed."""
    key_file = tmp_path / "store.key"
    key_file.write_text("00" * 32)
    settings = EdgeSettings.model_validate(
        {
            "data_dir": tmp_path,
            "experience": {"key_file": key_file},
            "traces": {"endpoint": "http://collector:4318", "sample": 0.5},
            "logs": {"format": "json"},
            "releases": {"canary_share": 0.5, "serve_keys": {"desk": "best"}},
        }
    )
    environment = command.serving_environment(
        settings, tmp_path / "c.sock", {}, command=[], on_cpu=True
    )
    for name in [name for name in os.environ if name.startswith("EDGE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("EDGE_"):
            monkeypatch.setenv(name, value)
    from edge_node.settings import load_settings

    read = load_settings()
    for group in ("base", "serving", "capture", "experience", "releases", "traces", "logs"):
        assert getattr(read, group) == getattr(settings, group), group
    open_experience(settings).close()
    open_experience(read).close()  # which refuses a sealed store without its key


def test_vllm_gets_every_group_that_its_side_reads() -> None:
    rooms = [
        Path(edge_node.__file__).parent / room for room in ("serving", "capture", "experience")
    ]
    code = "".join(file.read_text() for room in rooms for file in room.glob("*.py"))
    read = set(re.findall(r"\bsettings\.([a-z]+)\.", code)) & set(EdgeSettings.model_fields)
    assert read <= {*command.GROUPS, "logs"}, "EDGE_LOGS__FORMAT goes there by itself"
