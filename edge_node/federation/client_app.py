"""The node's round and its evaluation as a Flower ClientApp, for `flwr run` and simulation.

Train. In: `arrays` with the start release's factors (`<module>/A` float32 [rank, in_features],
`<module>/B` float32 [out_features, rank], scale 1; none for the base itself); `config` may hold
`round`, and `max_rank` of central's offer. Out: the increment's factors under the same names, with
the scale in B, and metrics with `num-examples`. Equal settings give equal shapes, so a stock flwr
strategy can aggregate them.

Evaluate. In: `arrays/<release>` of the candidate and its references, and `config` with central's
offer: `candidate`, `reference`, `tasks`, and as JSON `references` (environment -> release, where it
is not `reference`) and `suites` (environment -> first task and number of tasks; empty: `tasks` of
every environment). Out: `report` with `results` (JSON, the fields of
lorikeet.releases.v1.EnvironmentResult).

Every reply says in `node` who it is from. Only flwr's public packages are imported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_node.base_model import read_base
from edge_node.errors import SettingsError
from edge_node.experience import open_experience
from edge_node.learning.plans import plan_round
from edge_node.releases.evaluation import evaluation_seed
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import EdgeSettings, load_settings
from protos.base import BaseModelInfo
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, canonical_json, sha256_hex

ARRAYS, CONFIG, METRICS, REPORT, NODE = "arrays", "config", "metrics", "report", "node"
"""Names of the records in a message's content."""


def make_client_app(settings_for: Callable[[Context], EdgeSettings]) -> ClientApp:
    """An app whose virtual node gets its settings from its Flower context."""

    def train(message: Message, context: Context) -> Message:
        content = train_message(message.content, settings_for(context), node_name(context))
        return Message(content, reply_to=message)

    def evaluate(message: Message, context: Context) -> Message:
        content = evaluate_message(message.content, settings_for(context), node_name(context))
        return Message(content, reply_to=message)

    app = ClientApp()
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def node_name(context: Context) -> str:
    """A name from the partition: Flower's node id is another one in each run."""
    return str(context.node_config.get("partition-id", context.node_id))


def train_message(content: RecordDict, settings: EdgeSettings, node_id: str) -> RecordDict:
    """The reply to a train message; raises what a round raises, ValueError for bad arrays."""
    from edge_node.learning.round import train_on_experience  # torch: only where a round runs
    from edge_node.learning.workplace import find_workplace

    base = read_base(settings)
    arrays = next(iter(content.array_records.values()), ArrayRecord())
    config = dict(next(iter(content.config_records.values()), {}))
    number = int(str(config.get("round", 1)))
    start = read_arrays(arrays)
    experience = open_experience(settings)
    cursor = experience.cursor()
    plan = plan_round(
        settings.learning,
        number=number,
        node_id=node_id,
        release=_manifest_of(start, base, version=number - 1),
        cursor=cursor,
        deleted=experience.deleted(up_to=cursor),
        max_rank=int(str(config.get("max_rank", 0))) or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        release.mkdir()
        for name, data in peft_files(start, base.module_shapes).items():
            (release / name).write_bytes(data)
        place = find_workplace(plan, settings, release, Path(folder) / "round")
        trained = train_on_experience(plan, settings, place)
    metrics = MetricRecord({"num-examples": int(trained.metrics["examples"])})
    metrics.update({name: value for name, value in trained.metrics.items() if name != "examples"})
    records: dict[str, Any] = {
        ARRAYS: write_arrays(trained.tensors),
        METRICS: metrics,
        NODE: _sender(node_id),
    }
    return RecordDict(records)


def evaluate_message(content: RecordDict, settings: EdgeSettings, node_id: str) -> RecordDict:
    """The reply to an evaluate message; raises SettingsError, ValueError for bad arrays."""
    from edge_node.federation.answering import Comparison, compare

    config = content.config_records[CONFIG]
    suites, references = json.loads(str(config["suites"])), json.loads(str(config["references"]))
    reference, everything = str(config["reference"]), [0, int(str(config["tasks"]))]
    offered = {
        spec.name: Comparison(
            references.get(spec.name, reference), *suites.get(spec.name, everything)
        )
        for spec in settings.environments
        if not suites or spec.name in suites
    }
    releases = {
        name.removeprefix(f"{ARRAYS}/"): read_arrays(arrays)
        for name, arrays in content.array_records.items()
        if name.startswith(f"{ARRAYS}/")
    }
    results = compare(
        _base(settings),
        releases,
        str(config["candidate"]),
        settings.environments,
        offered,
        evaluation_seed(node_id),
    )
    report = ConfigRecord({"results": canonical_json(results).decode()})
    return RecordDict({REPORT: report, NODE: _sender(node_id)})


def write_arrays(tensors: LoraTensors) -> ArrayRecord:
    """Factors as arrays, modules in order, with the scale in B."""
    record = ArrayRecord()
    for name, module in sorted(tensors.modules.items()):
        record[f"{name}/A"] = Array(np.ascontiguousarray(module.A))
        record[f"{name}/B"] = Array(np.ascontiguousarray(module.B * np.float32(module.scale)))
    return record


def read_arrays(record: ArrayRecord) -> LoraTensors:
    """The opposite of `write_arrays`; raises ValueError naming the array."""
    modules = {}
    for key in record:
        name, _, factor = key.rpartition("/")
        if factor not in ("A", "B") or f"{name}/A" not in record or f"{name}/B" not in record:
            raise ValueError(
                f"Array {key!r} is not half of a pair; expected <module>/A and <module>/B."
            )
        modules[name] = LoraModule(
            record[f"{name}/A"].numpy().astype(np.float32),
            record[f"{name}/B"].numpy().astype(np.float32),
        )
    return LoraTensors(modules)


def _sender(node_id: str) -> ConfigRecord:
    return ConfigRecord({"name": node_id})


def _base(settings: EdgeSettings) -> Path:
    if settings.base.path is None:
        raise SettingsError(
            "EDGE_BASE__PATH is not set; a round needs the Hugging Face directory of the base "
            "model."
        )
    return settings.base.path


def _manifest_of(start: LoraTensors, base: BaseModelInfo, version: int) -> ReleaseManifest:
    payload = encode(start)
    return ReleaseManifest(
        base=base.digest,
        cohort="simulation",
        version=version,
        parent=None,
        plan=None,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        rank=start.rank,
        truncation_error=0.0,
        updates=[],
        created_at="",
    )


app = make_client_app(lambda context: load_settings())
