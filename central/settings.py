"""Settings of central, read once at the entry point from the environment (prefix CENTRAL_).

In: environment variables. Out: one frozen CentralSettings. Unknown keys are refused. Imports
nothing heavy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from central.errors import SettingsError
from central.operations_settings import (
    Group,
    ListenSettings,
    LogSettings,
    TraceSettings,
    WebhookSettings,
)
from protos.encoding import Encoding

PREFIX = "CENTRAL_"


class BaseModelSettings(Group):
    path: Path | None = None
    """Hugging Face directory of the base model. `central serve` needs it.

    Its configuration, tokenizer and safetensors headers are read.
    """


class JournalSettings(Group):
    url: str | None = None
    """SQLAlchemy URL; a SQLite file in the data directory when unset."""


class BlobSettings(Group):
    url: str | None = None
    """Where payloads lie: a path, or an fsspec URL such as s3://bucket/lorikeet.

    Unset: `blobs` in the data directory.
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the fsspec backend, as JSON, e.g. {"endpoint_url": "https://..."}. Credentials
    belong into the backend's own environment variables (for S3: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY).
    """


class MergePolicy(Group):
    min_updates: int = Field(default=2, ge=1)
    """Merge when this many updates wait in the cohort."""
    max_age_s: float = Field(default=900, gt=0)
    """Merge anyway when the oldest waiting update is this old."""
    strategy: str = "product-mean"
    """product-mean, or the name of a class in flwr.serverapp.strategy (for example FedAvg)."""
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the flwr strategy."""
    rank: int = Field(default=32, ge=1, le=512)
    """Rank R of a release."""
    exact_rank: int = Field(default=512, ge=1)
    """Largest summed rank of a module that is cut in one exact step; less takes less memory."""
    server_step: float = Field(default=1.0, gt=0)
    """eta in P(v+1) = trunc_R(P(v) + eta * U)."""
    encoding: Encoding = "float32"
    """How releases travel: float32, bf16 or int8. Nodes of older software read float32 only."""
    seed: int = 0
    """Seed of randomized kernels."""
    filter: Literal["none", "clip", "near", "multi-krum"] = "none"
    """Filter of a merge.

    clip lowers large increments. near leaves out those far from the others, when there are four or
    more. multi-krum leaves out the least typical. A node that alone holds some knowledge looks like
    an outlier. What is left out is set aside with the reason.
    """
    filter_norm: float | None = Field(default=None, gt=0)
    """clip: largest norm of an increment over all modules. Unset: the median in the merge."""
    filter_threshold: float = Field(default=3.5, gt=0)
    """near: how many (scaled median absolute) deviations above the median distance is too far."""
    filter_malicious: int = Field(default=1, ge=1)
    """multi-krum leaves out this many. For n it needs 2 n + 3 updates, also beyond max_age_s."""

    @property
    def fewest_updates(self) -> int:
        """Fewest updates of a merge, however old they are."""
        return 2 * self.filter_malicious + 3 if self.filter == "multi-krum" else 1

    @model_validator(mode="after")
    def _fits_together(self) -> MergePolicy:
        if self.min_updates < self.fewest_updates:
            raise ValueError(
                f"min_updates is {self.min_updates}; filter multi-krum with filter_malicious "
                f"{self.filter_malicious} needs at least {self.fewest_updates} updates. Raise "
                "min_updates, or choose the filter near"
            )
        if self.filter == "clip" and self.strategy != "product-mean":
            raise ValueError(
                f"filter clip bounds products; {self.strategy} averages factors. Use product-mean, "
                "or another filter"
            )
        return self


class MergeSettings(MergePolicy):
    cohorts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per cohort: the settings above that differ, as JSON, e.g. {"zeta": {"min_updates": 1}}."""

    def policy(self, cohort: str) -> MergePolicy:
        """The policy of one cohort."""
        return MergePolicy(
            **{**self.model_dump(exclude={"cohorts"}), **self.cohorts.get(cohort, {})}
        )


class ChannelPolicy(Group):
    first: Literal["stable", "canary"] = "stable"
    """Channel on which an accepted release appears.

    canary: nodes with EDGE_RELEASES__CHANNEL=canary try it before the others. The cohort merges
    nothing more until it is stable or rolled back.
    """
    soak_s: float = Field(default=0, ge=0)
    """A canary becomes stable by itself once nodes served it for this long without trouble.

    0: only an operator promotes.
    """


class ChannelSettings(ChannelPolicy):
    cohorts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per cohort: the settings above that differ, as JSON, e.g. {"acme": {"soak_s": 3600}}."""

    def policy(self, cohort: str) -> ChannelPolicy:
        """The policy of one cohort."""
        return ChannelPolicy(
            **{**self.model_dump(exclude={"cohorts"}), **self.cohorts.get(cohort, {})}
        )


class CohortSettings(Group):
    builds_on: dict[str, Literal["none", "shared"]] = Field(default_factory=dict)
    """By cohort, as JSON, e.g. {"acme": "shared"}.

    The cohort's nodes are served shared's stable release together with what they learnt themselves.
    Nothing flows back. Fixed when the cohort is created.
    """


class GateSettings(Group):
    tasks: int = Field(default=100, ge=1)
    """Held-out tasks per environment and node at the first look."""
    max_tasks: int = Field(default=6400, ge=1)
    """Undecided environments get fresh tasks, up to this many over all nodes.

    Each look doubles their number. At most CENTRAL_GATE__TASKS: one look decides.
    """
    deadline_s: float = Field(default=300, gt=0)
    """The first look waits for reports this long.

    A later look waits longer, in proportion to its tasks. A node that hangs costs this once.
    """
    absent_grace_s: float = Field(default=30, ge=0)
    """The gate waits only this long for a node that is not connected.

    So a dead site holds up nobody. A node that held up a first look for longer than this after the
    last result, and gave none, is not waited for at the next.
    """
    quorum: int = Field(default=1, ge=0)
    """Fewest reporting nodes for a verdict. 0: accept without evaluation (for tests)."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level of the one-sided paired tests, corrected over environments and spent over the looks."""
    tolerance_points: float = Field(default=1, ge=0)
    """An environment may fall by this many points below its high-water release.

    Only a larger fall counts in the test.
    """
    anchor_tolerance_points: float = Field(default=5, ge=0)
    """The same for anchor skill."""
    margin_points: float = Field(default=2.5, gt=0)
    """An environment is asked no further once its loss is surely below tolerance plus this."""
    likelihood_tolerance_nats: float = Field(default=0.05, ge=0)
    """Nats a token that the mean log-probability of texts may fall below its high-water release."""
    likelihood_margin_nats: float = Field(default=0.05, gt=0)
    """As margin_points, for the mean log-probability of texts."""
    attempts: int = Field(default=1, ge=1, le=64)
    """Answers to every task, by candidate and reference each.

    1: one greedy answer. k > 1: the answers are sampled, and the gate tests the first attempt
    (pass^1) and that all k pass (pass^k).
    """
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Sampling temperature when there are several attempts."""
    isolation_tries: int = Field(default=16, ge=0)
    """How many parts of a rejected candidate are tried to find the update that hurts.

    After this many tries no part is cut any further, and a rejected part is set aside whole. 0: a
    rejected candidate's updates are set aside at once.
    """
    environments: dict[str, float] = Field(default_factory=dict)
    """Tolerance by environment name, in points (of texts in nats); wins over those above."""


class QuarantineSettings(Group):
    isolated_updates: int = Field(default=3, ge=0)
    """A node goes into quarantine when this many of its last updates were each rejected alone.

    Its updates are then admitted and kept aside until `central nodes release`. 0: only an operator
    puts a node there.
    """
    window: int = Field(default=5, ge=1, le=100)
    """How many of the node's last verdicts count."""

    @model_validator(mode="after")
    def _fits_together(self) -> QuarantineSettings:
        if self.isolated_updates > self.window:
            raise ValueError(
                f"isolated_updates is {self.isolated_updates}, window {self.window}; expected at "
                "most as many as the window"
            )
        return self


class LimitSettings(Group):
    max_update_bytes: int = Field(default=512 << 20, ge=1)
    """Largest payload of one update."""
    max_rank: int = Field(default=64, ge=1)
    """Largest LoRA rank of an update."""
    max_norm: float = Field(default=1e3, gt=0)
    """Largest Frobenius norm of one module's increment."""
    node_quota_bytes: int = Field(default=16 << 30, ge=1)
    """Bytes that one node may have on central's disk.

    They are unfinished uploads, and updates that no release holds (waiting, superseded, set aside,
    in quarantine), until retention collects them.
    """
    reserve_bytes: int | None = Field(default=None, ge=0)
    """Central takes no upload while fewer bytes are free on a disk that it writes on.

    Unset: a twentieth of the disk, at most 1 GiB.
    """
    node_uploads: int = Field(default=4, ge=1)
    """Uploads, and questions about uploads, that one node may have open at once."""
    node_unfinished: int = Field(default=16, ge=1)
    """Unfinished uploads that central keeps of one node.

    With more, the one that was not touched for longest begins afresh.
    """
    node_updates_per_hour: int = Field(default=240, ge=1)
    """Updates of one node that central admits in an hour.

    Each of them stays in the journal and in memory for ever.
    """
    node_watches: int = Field(default=4, ge=1)
    """Watches that one node may have open at once.

    It needs one. Those of lost connections count until central notices.
    """
    upload_idle_s: float = Field(default=60, gt=0)
    """An upload is closed when no chunk comes for this long.

    What came stays, and the node goes on from there.
    """
    connections: int = Field(default=4096, ge=1)
    """Connections that nodes and operators may have open at once.

    There are fewer when the hard limit of open files leaves no room: each counts as two files.
    """
    enrollment_connections: int = Field(default=64, ge=1)
    """Connections that the enrolment port takes at once. Each of them lives for 20 s at most."""
    handshake_s: float = Field(default=20, gt=0)
    """A connection to either port is closed unless its TLS and HTTP/2 greeting ends by then."""


class RetentionSettings(Group):
    every_hours: float | None = Field(default=None, gt=0)
    """Collect blobs that nothing needs this often; unset: only by `central retention --apply`."""
    superseded_days: float = Field(default=7, ge=0)
    """Keep payloads of superseded updates this long. They never merge."""
    set_aside_days: float = Field(default=90, ge=0)
    """Keep payloads of updates that were set aside this long. Then they cannot be requeued."""
    rejected_days: float = Field(default=30, ge=0)
    """Keep payloads of rejected candidates this long after their verdict.

    So too payloads of abandoned releases that were never served.
    """
    uploads_days: float = Field(default=7, ge=1)
    """Keep unfinished uploads that no node goes on with this long.

    Less than a day would take them from slow nodes.
    """


class CentralSettings(BaseSettings):
    """One frozen group per room."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path("central-data")
    """Everything that must survive: keys, journal, blobs."""
    base: BaseModelSettings = BaseModelSettings()
    listen: ListenSettings = ListenSettings()
    journal: JournalSettings = JournalSettings()
    blobs: BlobSettings = BlobSettings()
    merge: MergeSettings = MergeSettings()
    channels: ChannelSettings = ChannelSettings()
    cohorts: CohortSettings = CohortSettings()
    gate: GateSettings = GateSettings()
    quarantine: QuarantineSettings = QuarantineSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    logs: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()

    @property
    def builds_on(self) -> dict[str, str]:
        """The cohort that a cohort builds on, by name, without those that build on none."""
        return {
            cohort: other for cohort, other in self.cohorts.builds_on.items() if other != "none"
        }

    @property
    def journal_url(self) -> str:
        """Where the journal is: the URL of the settings, or the file in the data directory."""
        return self.journal.url or f"sqlite:///{(self.data_dir / 'journal.db').absolute()}"


def load_settings() -> CentralSettings:
    """Settings from the environment; raises SettingsError with one line per mistake."""
    known = {name.upper() for name in CentralSettings.model_fields}
    mistakes = [
        f"{key}: unknown setting; expected one of "
        f"{', '.join(sorted(PREFIX + name for name in known))}"
        for key in sorted(os.environ)
        if key.upper().startswith(PREFIX)
        and key.upper().removeprefix(PREFIX).split("__")[0] not in known
    ]
    settings: CentralSettings | None = None
    try:
        settings = CentralSettings()
        mistakes += _cohort_mistakes("MERGE", settings.merge)
        mistakes += _cohort_mistakes("CHANNELS", settings.channels)
        if "shared" in settings.builds_on:
            mistakes.append(
                f"{PREFIX}COHORTS__BUILDS_ON shared: expected none, it is what others build on"
            )
    except ValidationError as error:
        mistakes += [
            f"{PREFIX}{'__'.join(place).upper()}: {text}" for place, text in _mistakes(error)
        ]
    except ValueError as error:  # pydantic-settings: a list or object that is not JSON
        mistakes.append(f"{error}; expected JSON")
    if mistakes or settings is None:
        raise SettingsError(
            "Settings are not usable. "
            + "; ".join(mistakes)
            + ". See central/settings.py for every setting."
        )
    return settings


def _cohort_mistakes(group: str, settings: MergeSettings | ChannelSettings) -> list[str]:
    found = []
    for cohort in settings.cohorts:
        try:
            settings.policy(cohort)
        except ValidationError as error:
            found += [
                f"{PREFIX}{group}__COHORTS {'.'.join([cohort, *place])}: {text}"
                for place, text in _mistakes(error)
            ]
    return found


def _mistakes(error: ValidationError) -> list[tuple[list[str], str]]:
    """Where pydantic found each mistake, and what it is."""
    found = []
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        secret = item["loc"][:2] == ("webhooks", "urls")  # an address may hold a token
        value = "" if secret else f" (value {item['input']!r})"
        text = "unknown setting" if unknown else f"{item['msg']}{value}"
        if item["type"] == "value_error":  # of several settings together
            text = item["msg"].removeprefix("Value error, ")
        found.append(([str(part) for part in item["loc"]], text))
    return found
