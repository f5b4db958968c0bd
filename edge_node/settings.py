"""Settings of the edge node, read once at the entry point from the environment (prefix EDGE_, nesting `__`).

In: environment variables. Out: one frozen EdgeSettings. Unknown keys are refused. Imports nothing heavy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from edge_node import vllm_arguments
from edge_node.errors import SettingsError

PREFIX = "EDGE_"


def _as_number(value: Any) -> Any:
    # A variable is text; a Literal of numbers, unlike int, does not read it.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BaseModelSettings(Group):
    path: Path | None = None
    """Hugging Face directory of the base model. Required by serve, enroll and doctor."""


class CentralSettings(Group):
    address: str = "localhost:9443"
    """host:port of central's mutual-TLS port."""
    enrollment_address: str = "localhost:9444"
    """host:port of central's enrolment port."""
    join_token: SecretStr | None = None
    """One-time token from `central tokens create`; used by enroll, and by serve when the node is not enrolled yet."""
    call_timeout_s: float = Field(default=30, gt=0)
    """Deadline of every unary call, and longest silence of a stream."""


class ServingSettings(Group):
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that the OpenAI-compatible endpoint listens on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI-compatible endpoint."""
    alias: str = Field(default="lorikeet", pattern=r"^[A-Za-z0-9._-]+$")
    """Stable model name that clients use; answers name the exact version as alias@version."""
    dtype: str = "auto"
    """vLLM's --dtype."""
    max_model_len: int | None = Field(default=None, ge=16)
    """vLLM's --max-model-len; the model's own when unset."""
    max_lora_rank: Annotated[Literal[8, 16, 32, 64, 128, 256, 320, 512], BeforeValidator(_as_number)] = 64
    """Largest adapter rank; at least the release rank plus the rank of a local round."""
    max_loras: int = Field(default=4, ge=3)
    """Adapters in one batch: stable, the previous one still in flight, and a candidate under evaluation."""
    max_cpu_loras: int = Field(default=32, ge=4)
    """Adapters kept in memory; at least EDGE_RELEASES__KEEP + 3."""
    extra_args: list[str] = Field(default_factory=list)
    """Further vLLM arguments, as a JSON list. Those that the node sets itself are refused
    (edge_node/vllm_arguments.py)."""
    startup_timeout_s: float = Field(default=600, gt=0)
    """A vLLM that is not ready by then is stopped and started again."""

    @property
    def reached_at(self) -> str:
        """The host by which this machine reaches the endpoint."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)


class CaptureSettings(Group):
    enabled: bool = True
    """Off: answers are served but nothing is kept, and feedback finds no interaction."""
    queue_size: int = Field(default=10_000, ge=1)
    """Finished answers that may wait for the disk; further ones are counted as lost."""
    durable_timeout_s: float = Field(default=5, gt=0)
    """How long the end of an answer waits for the disk; after that it goes out and the interaction counts as lost."""


class EnvironmentSpec(Group):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name in results and tolerances; the same environment has the same name on every node."""
    factory: str
    """`module:Class`, or the name of an entry point in the group lorikeet.environments."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    anchor: bool = False
    """True: what the base could do. Its examples are mixed into every round, and its loss is measured at the gate."""


class LearningSettings(Group):
    enabled: bool = True
    """Off: the node serves and evaluates but never trains."""
    rank: int = Field(default=8, ge=1, le=256)
    """LoRA rank of a round; central's offer may lower it."""
    alpha: float = Field(default=16, gt=0)
    """LoRA alpha; dW = alpha / rank * B A."""
    steps: int = Field(default=50, ge=1)
    """Optimizer steps of a round."""
    batch_own: int = Field(default=12, ge=1)
    """Own examples in each batch."""
    batch_hard: int = Field(default=4, ge=0)
    """Of these, how many are corrections of the start release's own answers, where there are any (at most batch_own):
    what is still wrong is met more often than what is known already."""
    batch_anchor: int = Field(default=8, ge=0)
    """Anchor examples in each batch."""
    anchor_pool: int = Field(default=1000, ge=1)
    """Distinct anchor examples to draw from."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak rate of the first round; linear decay inside a round."""
    round_decay: float = Field(default=0.7, gt=0, le=1)
    """Factor on the rate for each release that the start is away from the base."""
    min_examples: int = Field(default=50, ge=1)
    """Fewest stored examples that a round trains on."""
    min_new_failures: int = Field(default=5, ge=0)
    """New failed or corrected answers (by the serving release) before a round starts. 0: a node rehearses its work on
    every release that it got feedback on, which keeps the others' increments from wearing it away."""
    min_new_feedback: int = Field(default=1, ge=1)
    """New scores or corrections (of the serving release's answers) before a round starts."""
    supersede_after_s: float = Field(default=600, ge=0)
    """Another round from the same release waits this long after the last one started: a merge is probably under way."""
    max_examples: int = Field(default=4000, ge=1)
    """Newest examples that a round draws from."""
    checkpoint_steps: int = Field(default=10, ge=1)
    """A killed round goes on from its newest valid checkpoint."""
    seed: int = 0
    """Seed of sampling and initialisation, together with node and round."""
    poll_s: float = Field(default=1.0, gt=0)
    """How often the learner looks for new experience."""


class OutboxSettings(Group):
    approval: Literal["auto", "manual"] = "auto"
    """manual: an update waits for `edge-node outbox approve` before it leaves the node."""
    retry_s: float = Field(default=1.0, gt=0)
    """First pause after a failed upload; doubles up to 60 s."""


class ReleasesSettings(Group):
    channel: Literal["stable", "canary"] = "stable"
    """Channel that the alias follows."""
    evaluate: bool = True
    """Evaluate candidates for central on this node's environments."""
    keep: int = Field(default=8, ge=2)
    """Newest release directories that stay loaded and on disk."""
    max_rank: int | None = Field(default=None, ge=1)
    """Largest rank of a release that this node serves: of a larger one the first pairs, which approximate it best (at most
    EDGE_SERVING__MAX_LORA_RANK). Unset: whole releases."""


class EdgeSettings(BaseSettings):
    """One frozen group per room."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    data_dir: Path = Path("edge-data")
    """Everything that must survive: keys, experience, outbox, releases, checkpoints."""
    node_name: str = Field(
        default="edge-node", min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
    )
    """Name that the operator sees."""
    base: BaseModelSettings = BaseModelSettings()
    central: CentralSettings = CentralSettings()
    serving: ServingSettings = ServingSettings()
    capture: CaptureSettings = CaptureSettings()
    environments: list[EnvironmentSpec] = Field(default_factory=list)
    """Environments of this node, as a JSON list."""
    learning: LearningSettings = LearningSettings()
    outbox: OutboxSettings = OutboxSettings()
    releases: ReleasesSettings = ReleasesSettings()

    @model_validator(mode="after")
    def _arguments_are_possible(self) -> EdgeSettings:
        # Of all settings together, because the error of one field quotes it: it may hold API keys.
        if mistakes := vllm_arguments.mistakes(self.serving.extra_args):
            raise ValueError(f"EDGE_SERVING__EXTRA_ARGS: {'; '.join(mistakes)}")
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> EdgeSettings:
        # Kept ones, a candidate under evaluation and its reference, and an old version that a rollback made active again.
        needed = self.releases.keep + 3
        if self.serving.max_cpu_loras < needed:
            raise ValueError(
                f"EDGE_SERVING__MAX_CPU_LORAS is {self.serving.max_cpu_loras}; EDGE_RELEASES__KEEP="
                f"{self.releases.keep} needs at least {needed}. Raise the first or lower the second"
            )
        if (self.releases.max_rank or 0) > self.serving.max_lora_rank:
            raise ValueError(
                f"EDGE_RELEASES__MAX_RANK is {self.releases.max_rank}; vLLM accepts at most EDGE_SERVING__MAX_LORA_RANK="
                f"{self.serving.max_lora_rank}. Raise the second or lower the first"
            )
        return self


def load_settings() -> EdgeSettings:
    """Settings from the environment; raises SettingsError with one line per mistake."""
    known = {name.upper() for name in EdgeSettings.model_fields}
    mistakes = [
        f"{key}: unknown setting; expected one of {', '.join(sorted(PREFIX + name for name in known))}"
        for key in sorted(os.environ)
        if key.upper().startswith(PREFIX) and key.upper().removeprefix(PREFIX).split("__")[0] not in known
    ]
    try:
        settings = EdgeSettings()
    except ValidationError as error:
        for item in error.errors():
            if not item["loc"]:  # of several settings together; the input holds the join token too
                mistakes.append(item["msg"].removeprefix("Value error, "))
                continue
            variable = PREFIX + "__".join(str(part) for part in item["loc"]).upper()
            secret = "extra_args" in item["loc"]  # API keys are among them
            value = "" if secret or item["type"] == "extra_forbidden" else f" (value {item['input']!r})"
            text = "unknown setting" if item["type"] == "extra_forbidden" else item["msg"]
            mistakes.append(f"{variable}: {text}{value}")
    except ValueError as error:  # pydantic-settings: a list or object that is not JSON
        mistakes.append(f"{error}; expected JSON")
    if mistakes:
        raise SettingsError(
            "Settings are not usable. " + "; ".join(mistakes) + ". See edge_node/settings.py for every setting."
        )
    return settings
