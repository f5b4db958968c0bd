"""The simulation example without Flower: run config, nodes' stores, the picture, the pins."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edge_node.experience import ExperienceStore
from examples.simulation import config as config_module
from examples.simulation.client_app import remember
from examples.simulation.config import SimulationConfig
from examples.simulation.plot import write_plot
from examples.simulation.run import _as_toml, main
from tests.fakes.tiny_model import tiny_model

ROOT = Path(__file__).resolve().parents[3]
APP = tomllib.loads((ROOT / "examples/simulation/pyproject.toml").read_text())
DEFAULTS = APP["tool"]["flwr"]["app"]["config"]


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "build_base", lambda cache: tiny_model())


def test_every_key_of_the_run_config_is_read(tmp_path: Path) -> None:
    config = SimulationConfig.read(
        {**DEFAULTS, "folder": str(tmp_path), "strategy-options": '{"eta": 0.5}'}
    )
    assert {name.replace("_", "-") for name in vars(config)} == set(DEFAULTS)
    central = config.central(7)
    assert central.merge.strategy_options == {"eta": 0.5}
    assert central.data_dir == tmp_path / "central-7"
    assert central.gate.max_tasks == central.gate.tasks == DEFAULTS["tasks"]


@pytest.mark.parametrize(
    ("key", "value"), [("rounds", "three"), ("strategy-options", "{eta}"), ("rank", None)]
)
def test_a_bad_value_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Run config '{key}' is {value!r}"):
        SimulationConfig.read({**DEFAULTS, key: value})


def test_virtual_nodes_have_experience_of_their_own(tmp_path: Path) -> None:
    config = SimulationConfig.read({**DEFAULTS, "folder": str(tmp_path), "examples": 6})
    seen: list[set[str]] = []
    for partition in (0, 3, 1):
        settings = config.node(partition)
        for _ in range(2):  # the second time it is there
            remember(settings, config.examples, seed=1 + partition)
        store = ExperienceStore(settings.data_dir / "experience.db")
        examples = store.examples(up_to=store.cursor(), limit=100)
        assert len(examples) == 6
        assert {example.source for example in examples} == {"correction"}
        interactions = [store.interaction(example.interaction_id) for example in examples]
        seen.append(
            {str(interaction.messages) for interaction in interactions if interaction is not None}
        )
    assert [config.node(partition).environments[0].name for partition in (0, 3, 1)] == [
        "acme-a",
        "acme-a",
        "acme-b",
    ]
    assert not seen[0] & seen[1], "two nodes with one environment have met other tasks"


def test_the_picture_is_written(tmp_path: Path) -> None:
    rounds = [
        {
            "number": number,
            "accepted": accepted,
            "before": {"acme-a": 0.0, "public": 1.0} if rates else {},
            "after": rates,
        }
        for number, accepted, rates in (
            (1, False, {}),  # no candidate
            (2, True, {"acme-a": 0.3, "public": 0.9}),
            (3, False, {"acme-a": 0.2, "public": 0.9}),
        )
    ]
    report = {"nodes": 50, "seconds": 100.0, "config": {"strategy": "FedAdam"}, "rounds": rounds}
    write_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="make simulation installs it")
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["--folder", str(tmp_path)]) == 2
    assert "name another one" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize(
    ("given", "toml"),
    [("steps=20", "steps=20"), ("server-step=1.5", "server-step=1.5"),
     ("strategy=FedAdam", "strategy='FedAdam'")]
)  # fmt: skip
def test_run_config_values_are_toml(given: str, toml: str) -> None:
    assert _as_toml(given) == toml


def test_the_lock_of_the_extra_adds_to_the_other_and_changes_nothing() -> None:
    pins = {
        name: dict(
            line.split("==")
            for line in (ROOT / "requirements" / f"{name}.lock").read_text().split()
        )
        for name in ("cpu", "simulation")
    }
    assert set(pins["simulation"]) == {"msgpack", "ray"}
    assert not pins["simulation"].keys() & pins["cpu"].keys()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["simulation"]
    assert extra == [f"flwr[simulation]=={pins['cpu']['flwr']}"]
