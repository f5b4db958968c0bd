"""Our ServerApp and ClientApp on a Flower Grid, with strategies of ours and of flwr."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from central.cli import main
from central.cohort.errors import FederationError
from central.cohort.simulation import Round, simulate
from central.errors import SettingsError
from central.journal import verify_journal
from central.settings import CentralSettings
from edge_node.federation.client_app import make_client_app, node_name, write_arrays
from edge_node.settings import EdgeSettings
from protos.base import read_base_model
from protos.lora import LoraModule, LoraTensors
from tests.contract.cohort_loop import make_increment, result
from tests.fakes.flower_grid import InProcessGrid
from tests.fakes.node_data import activate, make_node, meet
from tests.fakes.tiny_model import tiny_model

NODES = 5
TOO_LARGE: set[str] = set()
"""`round/node` of stub updates that no merge takes."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ClientApp:
    """Each virtual node has experience of its own on the tiny model."""
    root = tmp_path_factory.mktemp("nodes")

    def settings_for(context: Context) -> EdgeSettings:
        node = int(context.node_config["partition-id"])
        known = root / str(node)
        settings = make_node(known, steps=2, rank=4, batch_own=2, batch_anchor=1, anchor_pool=20)
        if not (known / "experience.db").exists():
            label = activate(settings, LoraTensors(), version=0).label
            meet(settings, label, 4, first=10 * node)
        return settings

    return make_client_app(settings_for)


@pytest.fixture
def stub() -> ClientApp:
    """Trains nothing: factors drawn from node and round; every candidate passes all its tasks."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number, name = int(message.content["config"]["round"]), node_name(context)
        increment = make_increment(100 * number + int(name))
        if f"{number}/{name}" in TOO_LARGE:
            increment = LoraTensors(
                {
                    module: LoraModule(np.float32(1e6) * factors.A, factors.B)
                    for module, factors in increment.modules.items()
                }
            )
        metrics = MetricRecord({"num-examples": 1, "loss_first": 1.0})
        records = {
            "arrays": write_arrays(increment),
            "metrics": metrics,
            "node": sender(context),
        }
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        report = ConfigRecord({"results": json.dumps([result("words", both=4, c=0, neither=0)])})
        return Message(RecordDict({"report": report, "node": sender(context)}), reply_to=message)

    return app


def sender(context: Context) -> ConfigRecord:
    return ConfigRecord({"name": node_name(context)})


def settings(folder: Path, **merge: object) -> CentralSettings:
    gate = {
        "tasks": 4,
        "max_tasks": 4,
        "isolation_tries": 0,
        "tolerance_points": 100,
        "anchor_tolerance_points": 100,
    }
    policy = {"min_updates": 3, "rank": 8, **merge}
    return CentralSettings(data_dir=folder, merge=policy, gate=gate)  # type: ignore[arg-type]


class Seen:
    """Keeps the rounds, and checks that progress goes up to what was asked."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self._last = (0, 0)

    def on_progress(self, number: int, message_type: str, replied: int, asked: int) -> None:
        assert number == len(self.rounds) + 1
        assert 0 < replied <= asked
        self._last = (replied, asked)

    def on_round(self, round: Round) -> None:
        assert self._last[0] == self._last[1]
        self.rounds.append(round)


def run(
    grid: InProcessGrid, settings: CentralSettings, rounds: int, nodes_per_round: int = 0
) -> list[Round]:
    seen = Seen()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    base = read_base_model(tiny_model()).digest
    simulate(grid, context, settings, base, rounds, nodes_per_round, seen)
    return seen.rounds


def payloads(folder: Path) -> list[str]:
    state = verify_journal(f"sqlite:///{folder}/journal.db")
    return [release.manifest.payload.digest_sha256 for release in state.releases.values()]


def test_virtual_nodes_go_through_the_loop_of_central(
    app: ClientApp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = InProcessGrid(app, NODES)
    rounds = run(grid, settings(tmp_path / "a"), 2)
    assert [(r.number, r.trained, r.failed, r.accepted) for r in rounds] == [
        (1, 5, 0, True),
        (2, 5, 0, True),
    ]
    assert set(rounds[0].before) == set(rounds[1].after) == {"words"}
    assert rounds[1].before == rounds[0].after
    assert grid.asked.count(("train", 4)) == grid.asked.count(("evaluate", 4)) == 2
    state = verify_journal(f"sqlite:///{tmp_path}/a/journal.db")
    assert [len(release.manifest.updates) for release in state.releases.values()] == [0, 5, 5]
    assert {update.state for update in state.updates.values()} == {"merged"}
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path / "a"))
    with pytest.raises(SystemExit) as done:
        main(["releases", "verify", "--deep"])
    assert done.value.code == 0
    assert capsys.readouterr().out.count("identical") == 3


@pytest.mark.parametrize("strategy", ["FedAdam", "FedMedian", "Krum", "product-mean"])
def test_strategies_of_flwr_take_the_same_way(
    stub: ClientApp, tmp_path: Path, strategy: str
) -> None:
    rounds = run(InProcessGrid(stub, NODES), settings(tmp_path / "b", strategy=strategy), 2)
    assert [r.accepted for r in rounds] == [True, True]
    state = verify_journal(f"sqlite:///{tmp_path}/b/journal.db")
    assert [bool(r.server_state) for r in state.releases.values()] == [
        False,
        *[strategy == "FedAdam"] * 2,
    ]


def test_a_run_can_be_repeated_and_a_broken_node_holds_up_nobody(
    stub: ClientApp, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (first,) = run(
            InProcessGrid(stub, NODES, frozenset({2})),
            settings(tmp_path / folder),
            1,
            nodes_per_round=4,
        )
        assert first.trained + first.failed == 4
    assert payloads(tmp_path / "one") == payloads(tmp_path / "two")


def test_a_round_without_a_candidate_is_told_and_the_next_one_goes_on(
    stub: ClientApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.TOO_LARGE", {"2/0", "2/1", "2/2"})
    rounds = run(InProcessGrid(stub, 3), settings(tmp_path / "d"), 3)
    assert [(r.number, bool(r.release), r.accepted) for r in rounds] == [
        (1, True, True),
        (2, False, False),
        (3, True, True),
    ]
    assert rounds[1].text.startswith("no candidate came of its 3 updates; 1 set aside, the first: ")
    assert "cannot be merged" in rounds[1].text
    assert (rounds[1].before, rounds[1].after) == ({}, {})
    state = verify_journal(f"sqlite:///{tmp_path}/d/journal.db")
    assert [len(release.manifest.updates) for release in state.releases.values()] == [0, 3, 3]


def test_the_first_round_may_make_no_candidate(
    stub: ClientApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.TOO_LARGE", {"1/0", "1/1", "1/2"})
    (only,) = run(InProcessGrid(stub, 3), settings(tmp_path / "e"), 1)
    assert (only.release, only.accepted) == ("", False)


def test_what_cannot_work_is_said(stub: ClientApp, tmp_path: Path) -> None:
    grid = InProcessGrid(stub, NODES, frozenset({0, 1, 2}))
    with pytest.raises(
        FederationError, match=r"2 of 5 virtual nodes trained; a merge needs 3.*out of memory"
    ):
        run(grid, settings(tmp_path / "few"), 1)
    with pytest.raises(FederationError, match="holds something already"):
        run(grid, settings(tmp_path / "few"), 1)
    with pytest.raises(SettingsError, match="unknown strategy"):
        run(grid, settings(tmp_path / "new", strategy="Median"), 1)
