"""Settings of the edge node, read once, at the entry point (prefix EDGE_, nesting `__`).

In: environment variables. Out: one frozen EdgeSettings. Guarantees: unknown keys are refused;
imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from edge_node import schedule, vllm_arguments
from edge_node.errors import SettingsError
from edge_node.experience_settings import CaptureSettings, ExperienceSettings
from edge_node.operations_settings import LogSettings, TraceSettings
from edge_node.releases_settings import ReleasesSettings
from edge_node.round_settings import GateSettings, SdftSettings
from edge_node.serving_settings import Group, ServingSettings
from protos.encoding import Encoding

PREFIX = "EDGE_"


class BaseModelSettings(Group):
    path: Path | None = None
    """Hugging Face directory of the base model. Required by serve, enroll and doctor."""


class CentralSettings(Group):
    address: str = "localhost:9443"
    """host:port of central's mutual-TLS port."""
    enrollment_address: str = "localhost:9444"
    """host:port of central's enrolment port."""
    join_token: SecretStr | None = None
    """One-time token of `central tokens create`, for `enroll` or the first `serve`."""
    call_timeout_s: float = Field(default=30, gt=0)
    """Deadline of every unary call, and longest silence of a stream."""


class EnvironmentSpec(Group):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name in results and tolerances; the same environment has the same name on every node."""
    factory: str
    """`module:Class`, or the name of an entry point in the group lorikeet.environments."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    anchor: bool = False
    """True: what the base could do. Every sft round learns from it, unless EDGE_LEARNING__ANCHORS
    is set; the gate measures its loss.

    An environment of texts is measured only.
    """
    call_timeout_s: float = Field(default=60, gt=0, le=300)
    """Longest time of one call, and of loading, which has at least 60. Then it is ended."""
    run_timeout_s: float = Field(default=300, gt=0, le=3600)
    """Longest time of one run of an agent. Then the run is cancelled."""
    memory_mb: int = Field(default=2048, ge=256)
    """Most memory of its process, in MiB: what it allocates, without code and shared libraries."""
    rollouts: bool = False
    """True: the node may learn from this verifier by reinforcement learning (GRPO), without
    feedback. Not for an anchor.
    """

    @model_validator(mode="after")
    def _an_anchor_is_not_explored(self) -> EnvironmentSpec:
        if self.anchor and self.rollouts:
            raise ValueError(
                f"environment {self.name!r} has anchor and rollouts; expected one of them. An "
                "anchor is what the base could do already"
            )
        return self


class GrpoSettings(Group):
    """Rounds of reinforcement learning: EDGE_LEARNING__GRPO__*."""

    prompts: int = Field(default=16, ge=1)
    """Tasks that each optimizer step asks."""
    samples: int = Field(default=8, ge=2, le=128)
    """Answers to each task; they are judged against each other."""
    max_answer_tokens: int = Field(default=128, ge=1)
    """Longest sampled answer; of an environment with tools the longest turn."""
    max_turns: int = Field(default=8, ge=1)
    """Most answers of the model in an episode of an environment with tools, in rounds and in the
    node's evaluations. The calls of the last one are run.
    """
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Of the samples. Only at 1 are vLLM's log-probabilities those of the sampling distribution, so
    only then are its and the trainer's differences corrected for.
    """
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak rate; linear decay inside a round."""
    steps: int = Field(default=40, ge=1)
    """Optimizer steps of a round."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the start release, which is measured at any weight."""
    warm_steps: int = Field(default=20, ge=0)
    """Where every answer to a round's tasks scored zero, the next round begins with so many
    supervised steps on verified examples. 0: nothing more is tried from that release.
    """
    in_flight: int = Field(default=16, ge=1)
    """Most rollout requests in vLLM at once; each is for all samples of one task. With tools: most
    tasks at once, with a request for each sample. Of agents: most runs at once, but never above 16.
    """
    yield_above: int = Field(default=8, ge=0)
    """While more requests of users than this are in flight, no new rollout starts."""


class FeedbackSettings(Group):
    """Rounds that learn from preferences (dpo) and thumbs (kto): EDGE_LEARNING__FEEDBACK__*."""

    batch: int = Field(default=8, ge=2)
    """Preferences in each batch, or thumbs: as many liked answers as disliked ones."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull back to the start release (DPO, KTO)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate; linear decay inside a round."""
    steps: int = Field(default=40, ge=1)
    """Optimizer steps of a round."""


class LearningSettings(Group):
    enabled: bool = True
    """Off: the node serves and evaluates but never trains."""
    method: Literal["auto", "sft", "dpo", "scored", "kto", "grpo"] = "auto"
    """How a round learns: `sft` from corrections and verified answers, `dpo` from preferences,
    `scored` from groups of answers that a client scored, `kto` from thumbs, `grpo` from the
    verifiers of environments with `rollouts`. auto: the first of these for which there is enough
    that is new.
    """
    grpo: GrpoSettings = GrpoSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    gate: GateSettings = GateSettings()
    sdft: SdftSettings = SdftSettings()
    rank: int = Field(default=8, ge=1, le=256)
    """LoRA rank of a round; central's offer may lower it."""
    alpha: float = Field(default=16, gt=0)
    """LoRA alpha; dW = alpha / rank * B A."""
    steps: int = Field(default=50, ge=1)
    """Optimizer steps of a round."""
    batch_own: int = Field(default=12, ge=1)
    """Own examples in each batch."""
    batch_hard: int = Field(default=4, ge=0)
    """Of these, corrections of the start release's own answers, where there are any (at most
    batch_own). What is still wrong is met more often than what is known already.
    """
    batch_replay: int = Field(default=4, ge=0)
    """Of these, examples of what earlier releases answered, in equal parts of each release, however
    long ago (at most half of what batch_hard leaves). What earlier rounds learnt stays learnt. 0:
    none but those that are among the newest `max_examples`.
    """
    batch_anchor: int = Field(default=8, ge=0)
    """Anchor examples in each batch."""
    anchor_pool: int = Field(default=1000, ge=1)
    """Distinct examples of anchor environments to draw from."""
    anchors: Path | None = None
    """Directory of `edge-node anchors make`: the base's own samples. Set, they are the anchors of
    sft and grpo rounds, and anchor environments are only measured by the gate.
    """
    kl: float = Field(default=1.0, ge=0)
    """Weight of the KL divergence from the base on the samples in EDGE_LEARNING__ANCHORS."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak rate of the first round; linear decay inside a round."""
    round_decay: float = Field(default=0.7, gt=0, le=1)
    """Factor on the rate for each release that the start is away from the base."""
    min_examples: int = Field(default=50, ge=1)
    """Fewest stored examples that a round trains on; of preferences, scored groups and thumbs the
    same number each.
    """
    min_new_failures: int = Field(default=5, ge=0)
    """New failed or corrected answers (by the serving release) before a round starts. 0: a node
    rehearses its work on every release that it got feedback on. That protects its work from the
    others' increments.
    """
    min_new_feedback: int = Field(default=1, ge=1)
    """New scores or corrections (of the serving release's answers) before a round starts."""
    supersede_after_s: float = Field(default=600, ge=0)
    """Another round from the same release waits this long: a merge is probably under way."""
    max_examples: int = Field(default=4000, ge=1)
    """Newest examples that a round draws from."""
    checkpoint_steps: int = Field(default=10, ge=1)
    """A killed round goes on from its newest valid checkpoint."""
    seed: int = 0
    """Seed of sampling and initialisation, together with node and round."""
    poll_s: float = Field(default=1.0, gt=0)
    """How often the learner looks for new experience."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trains. auto: a GPU where torch sees one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of a round's arithmetic; weights, factors and the merge of a release stay float32. auto:
    bfloat16 from 50 million parameters on.
    """
    target_modules: str | list[str] = "all-linear"
    """Modules that a round trains: all-linear, attention, a JSON list of names that a module's name
    is or ends with (`["q_proj", "v_proj"]`), or a regular expression of a whole name.
    """
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a forward pass, padding included; a longer example is alone in one. A step
    stays the same but for rounding: only its memory shrinks. Unset: a step is one pass.
    """

    schedule: list[str] = Field(default_factory=list)
    """When rounds may run, as a JSON list of windows: `["22:00-06:00"]` is in UTC, `["22:00-06:00
    local"]` in this machine's time zone. Outside of them no round starts, and one that runs ends at
    a checkpoint and goes on in the next. Empty: always.
    """
    yield_in_flight: int | None = Field(default=None, ge=0)
    """A step waits while more requests of users than this are in flight. Unset: no such limit."""
    yield_first_token_s: float | None = Field(default=None, gt=0)
    """A step, and each rollout, waits while a stream of a user has waited longer for its first
    piece, in the last 10 seconds. Unset: no such limit.
    """
    yield_at_most_s: float = Field(default=60, ge=0)
    """Longest such wait of one step or rollout, so that a round ends at a busy node too."""
    tensorboard: bool = False
    """Write TensorBoard files of the newest 20 rounds into learning/reports/<round>/tensorboard.
    Needs the package tensorboardX or tensorboard.
    """

    @field_validator("schedule")
    @classmethod
    def _has_windows(cls, value: list[str]) -> list[str]:
        for text in value:
            schedule.read_window(text)
        return value

    @field_validator("target_modules")
    @classmethod
    def _names_modules(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all(value):
            raise ValueError("no name; expected all-linear, attention, names or an expression")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value


class OutboxSettings(Group):
    approval: Literal["auto", "manual"] = "auto"
    """manual: an update waits for `edge-node outbox approve` before it leaves the node."""
    retry_s: float = Field(default=1.0, gt=0)
    """First pause after a failed upload; doubles up to 60 s."""
    encoding: Encoding = "bf16"
    """How an increment travels: float32, bf16 (half its bytes) or int8 in blocks of 64 (about a
    quarter). A central that does not offer the encoding gets float32.
    """


class EdgeSettings(BaseSettings):
    """One frozen group per room."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path("edge-data")
    """Everything that must survive: keys, experience, outbox, releases, checkpoints."""
    node_name: str = Field(
        default="edge-node",
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
    )
    """Name that the operator sees."""
    base: BaseModelSettings = BaseModelSettings()
    central: CentralSettings = CentralSettings()
    serving: ServingSettings = ServingSettings()
    capture: CaptureSettings = CaptureSettings()
    experience: ExperienceSettings = ExperienceSettings()
    environments: list[EnvironmentSpec] = Field(default_factory=list)
    """Environments of this node, as a JSON list."""
    learning: LearningSettings = LearningSettings()
    outbox: OutboxSettings = OutboxSettings()
    releases: ReleasesSettings = ReleasesSettings()
    logs: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()

    @model_validator(mode="after")
    def _arguments_are_possible(self) -> EdgeSettings:
        # Of all settings together, because the error of one field quotes it: it may hold API keys.
        if mistakes := vllm_arguments.mistakes(self.serving.extra_args):
            raise ValueError(f"EDGE_SERVING__EXTRA_ARGS: {'; '.join(mistakes)}")
        return self

    @model_validator(mode="after")
    def _grpo_has_a_verifier(self) -> EdgeSettings:
        if self.learning.method == "grpo" and not any(spec.rollouts for spec in self.environments):
            raise ValueError(
                "EDGE_LEARNING__METHOD is grpo, and no environment has rollouts. Set `rollouts: "
                "true` for one in EDGE_ENVIRONMENTS, or take another method"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> EdgeSettings:
        # Kept ones, a candidate, its reference, and an old version that a rollback made active.
        needed = self.releases.keep + 3
        needed += self.releases.has_canary + 2 * self.releases.may_serve_own
        judges = bool(self.learning.gate.tasks and self.environments)
        if self.learning.enabled and (judges or any(one.rollouts for one in self.environments)):
            needed += 2  # the policy, and the one before it while it is unloaded
        if self.serving.max_cpu_loras < needed:
            raise ValueError(
                f"EDGE_SERVING__MAX_CPU_LORAS is {self.serving.max_cpu_loras}; EDGE_RELEASES__KEEP="
                f"{self.releases.keep} needs at least {needed}. Raise the first or lower the second"
            )
        if (self.releases.max_rank or 0) > self.serving.max_lora_rank:
            raise ValueError(
                f"EDGE_RELEASES__MAX_RANK is {self.releases.max_rank}; vLLM accepts at most "
                f"EDGE_SERVING__MAX_LORA_RANK={self.serving.max_lora_rank}. Raise the second or "
                "lower the first"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> EdgeSettings:
        longest, answer = self.serving.max_model_len, self.releases.max_answer_tokens
        if longest is not None and answer is not None and answer > longest:
            raise ValueError(
                f"EDGE_RELEASES__MAX_ANSWER_TOKENS is {answer}; vLLM refuses more than "
                f"EDGE_SERVING__MAX_MODEL_LEN={longest}. Lower the first or raise the second"
            )
        return self


def load_settings() -> EdgeSettings:
    """Settings from the environment; raises SettingsError with one line per mistake."""
    known = {name.upper() for name in EdgeSettings.model_fields}
    mistakes = [
        f"{key}: unknown setting; expected one of "
        f"{', '.join(sorted(PREFIX + name for name in known))}"
        for key in sorted(os.environ)
        if key.upper().startswith(PREFIX)
        and key.upper().removeprefix(PREFIX).split("__")[0] not in known
    ]
    try:
        settings = EdgeSettings()
    except ValidationError as error:
        for item in error.errors():
            if not item["loc"]:  # of several settings together; the input holds the join token too
                mistakes.append(item["msg"].removeprefix("Value error, "))
                continue
            variable = PREFIX + "__".join(str(part) for part in item["loc"]).upper()
            # API keys are among the first; a group holds them too, or an address with a password.
            secret = "extra_args" in item["loc"] or isinstance(item["input"], dict)
            value = (
                "" if secret or item["type"] == "extra_forbidden" else f" (value {item['input']!r})"
            )
            text = item["msg"].removeprefix("Value error, ")
            text = "unknown setting" if item["type"] == "extra_forbidden" else text
            mistakes.append(f"{variable}: {text}{value}")
    except ValueError as error:  # pydantic-settings: a list or object that is not JSON
        mistakes.append(f"{error}; expected JSON")
    if mistakes:
        raise SettingsError(
            "Settings are not usable. "
            + "; ".join(mistakes)
            + ". See edge_node/settings.py for every setting."
        )
    return settings
