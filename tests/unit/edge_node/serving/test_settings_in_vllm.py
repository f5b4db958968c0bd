"""What of the node's settings reaches vLLM's process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import edge_node
from edge_node.experience_settings import ExperienceSettings
from edge_node.operations_settings import TraceSettings
from edge_node.serving import command
from edge_node.settings import EdgeSettings


def test_vllm_gets_every_group_that_its_side_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the file of the key it would write plain texts into a sealed store."""
    key = tmp_path / "experience.key"
    settings = EdgeSettings(data_dir=tmp_path).model_copy(
        update={
            "experience": ExperienceSettings(key_file=key),
            "traces": TraceSettings(endpoint="http://127.0.0.1:4318"),
        }
    )
    environment = command.serving_environment(
        settings, tmp_path / "c.sock", {}, command=[], on_cpu=True
    )
    for name in list(environment):
        if name.startswith("EDGE_"):
            monkeypatch.setenv(name, environment[name])
    from edge_node.settings import load_settings

    for group in command.GROUPS:
        assert getattr(load_settings(), group) == getattr(settings, group), group
    # What the code that runs inside vLLM reads of the settings.
    rooms = [
        Path(edge_node.__file__).parent / room for room in ("serving", "capture", "experience")
    ]
    code = "".join(file.read_text() for room in rooms for file in room.glob("*.py"))
    read = set(re.findall(r"\bsettings\.([a-z]+)\.", code)) & set(EdgeSettings.model_fields)
    assert read <= {*command.GROUPS, "logs"}, "logs: its form alone, by a variable"
