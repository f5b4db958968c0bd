"""The node's round as a Flower ClientApp, for `flwr run` and simulation.

In: a train message whose `arrays` hold the start release's factors (`<module>/A` float32 [rank, in_features],
`<module>/B` float32 [out_features, rank], scale 1; none for the base itself) and whose `config` may hold `round`. Out:
the increment's factors under the same names, with the scale in B, and metrics with `num-examples`. Equal settings give
equal shapes, so a stock flwr strategy can aggregate them. Only flwr's public packages are imported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_node.experience import ExperienceStore
from edge_node.learning.records import plan_round
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import EdgeSettings, load_settings
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex


def make_client_app(settings_for: Callable[[Context], EdgeSettings]) -> ClientApp:
    """An app whose virtual node's settings (data directory, environments) come from its Flower context."""

    def train(message: Message, context: Context) -> Message:
        return Message(train_message(message.content, settings_for(context), str(context.node_id)), reply_to=message)

    app = ClientApp()
    app.train()(train)
    return app


def train_message(content: RecordDict, settings: EdgeSettings, node_id: str) -> RecordDict:
    """The content of the reply to a train message; raises what a round raises, and ValueError for unusable arrays."""
    from edge_node.learning.round import train_on_experience  # torch: only where a round runs

    if settings.base.path is None:
        raise ValueError("EDGE_BASE__PATH is not set; a round needs the Hugging Face directory of the base model.")
    base = read_base_model(settings.base.path)
    arrays = next(iter(content.array_records.values()), ArrayRecord())
    config = next(iter(content.config_records.values()), None)
    number = int(str(config["round"])) if config is not None and "round" in config else 1
    start = read_arrays(arrays)
    plan = plan_round(
        settings.learning,
        number=number,
        node_id=node_id,
        release=_manifest_of(start, base, version=number - 1),
        cursor=ExperienceStore(settings.data_dir / "experience.db").cursor(),
        max_rank=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        release.mkdir()
        for name, data in peft_files(start, base.module_shapes).items():
            (release / name).write_bytes(data)
        trained = train_on_experience(plan, settings, release, Path(folder) / "round")
    metrics = MetricRecord({"num-examples": int(trained.metrics["examples"])})
    metrics.update({name: value for name, value in trained.metrics.items() if name != "examples"})
    return RecordDict({"arrays": write_arrays(trained.tensors), "metrics": metrics})


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
            raise ValueError(f"Array {key!r} is not half of a pair; expected <module>/A and <module>/B.")
        modules[name] = LoraModule(
            record[f"{name}/A"].numpy().astype(np.float32), record[f"{name}/B"].numpy().astype(np.float32)
        )
    return LoraTensors(modules)


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
