"""`edge-node doctor` on the base's own samples."""

from __future__ import annotations

from pathlib import Path

from edge_node.doctor import run_check
from edge_node.settings import EdgeSettings
from tests.fakes.anchors import make_tiny_anchors
from tests.fakes.node_data import make_node
from tests.fakes.tiny_model import tiny_model


async def said(settings: EdgeSettings, name: str) -> tuple[bool, str]:
    check = await run_check(name, settings)
    return check.ok, check.text


async def test_doctor_reads_the_anchors(tmp_path: Path) -> None:
    ok, text = await said(make_node(tmp_path / "node"), "anchors")
    assert (ok, "EDGE_LEARNING__ANCHORS is not set" in text) == (True, True)

    anchors = make_tiny_anchors(tmp_path / "anchors")
    settings = make_node(tmp_path / "node", anchors=anchors)
    expected = f"4 plain, 3 open, 2 qa by this base, in {anchors}"
    assert await said(settings, "anchors") == (True, expected)

    (anchors / "hidden.safetensors").unlink()
    ok, text = await said(settings, "anchors")
    assert (ok, "are damaged: hidden.safetensors cannot be read" in text) == (False, True)

    other = make_tiny_anchors(tmp_path / "other", base=tiny_model(seed=1))
    ok, text = await said(make_node(tmp_path / "node", anchors=other), "anchors")
    assert (ok, "this node's base is" in text) == (False, True)


async def test_doctor_says_what_is_missing_without_an_anchor_environment(tmp_path: Path) -> None:
    settings = make_node(tmp_path / "node").model_copy(update={"environments": []})
    ok, text = await said(settings, "environments")
    assert (ok, text) == (
        True,
        "none; no anchor of tasks: rounds will not protect what the base could do",
    )
    learning = settings.learning.model_copy(update={"anchors": tmp_path})
    ok, text = await said(settings.model_copy(update={"learning": learning}), "environments")
    assert text == "none; no anchor of tasks: the gate will not measure what the base could do"
