"""Every metric of ours that the programs export, by asking them.

In: a scratch directory. Out: names, as Prometheus has them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from central.calls import Calls
from central.fleet.presence import Presence
from central.intake.uploads import Uploads
from central.journal import Journal
from central.monitoring.figures import Sources, make_registry
from central.space import Space
from edge_node.experience import ExperienceStore
from edge_node.figures import Tally
from edge_node.figures.gather import Gatherer
from edge_node.figures.tally import note_heard
from edge_node.identity import Identity
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import Progress, Report, report_folder
from edge_node.outbox import Outbox
from edge_node.serving.metrics import register
from protos.lora import LoraTensors
from tests.fakes.gateway import make_gateway
from tests.fakes.node_data import activate, make_node
from tests.unit.central import builders as make
from tests.unit.edge_node.learning.test_records import make_plan
from tests.unit.edge_node.outbox.test_outbox_store import add

STEP = {"step": 1, "loss": 1.0, "reward": 0.5, "kl_release": 0.1, "kl_base": 0.2}


def central_names(folder: Path) -> set[str]:
    """Of the metrics port, process_* among them."""
    journal = Journal(f"sqlite:///{folder / 'journal.db'}")
    journal.append(make.cohort_created(make.make_release()), make.token_created())
    journal.append(make.node_enrolled())
    sources = Sources(
        journal,
        Presence(),
        Uploads(folder / "uploads"),
        Space([folder]),
        Calls(),
        lambda cohort: "",
        [],
        folder / "journal.db",
    )
    names = names_in(generate_latest(make_registry(sources)))
    journal.close()
    return names


def node_names(folder: Path) -> set[str]:
    """Of a node that has done everything once; vLLM's are not among them."""
    settings = make_node(folder / "node")
    data_dir = settings.data_dir
    activate(settings, LoraTensors({}), 1)
    note_heard(data_dir)
    tally = Tally()
    tally.switched(1.0)
    tally.proved("passed")
    outbox = Outbox(data_dir / "outbox", "auto")
    _end_a_round(data_dir)
    add(outbox)
    experience = ExperienceStore(data_dir / "experience.db")
    engine = SimpleNamespace(generation=1)
    gatherer = Gatherer(data_dir, Identity.load(data_dir), engine, outbox, experience, tally)
    gateway = make_gateway(data_dir)
    gateway.counts.tell(gatherer.families())
    registry = CollectorRegistry()
    register(gateway, registry)
    names = names_in(generate_latest(registry))
    gateway.recorder.close()
    return names


def _end_a_round(data_dir: Path) -> None:
    plan = make_plan()
    rounds = RoundStore(data_dir / "learning")
    rounds.begin(plan)
    Report(report_folder(data_dir, plan.round_id)).tell(Progress(1, 1, 2.0, entries=[STEP]))
    rounds.finish(plan.round_id, "an update")


def names_in(text: bytes) -> set[str]:
    """Of a scrape, also those without a sample."""
    return {line.split()[2] for line in text.decode().splitlines() if line.startswith("# HELP ")}
