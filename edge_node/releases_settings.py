"""Settings of the releases room: what the node follows, keeps, evaluates and goes back to.

In: what `settings.py` read from EDGE_RELEASES__*. Out: one frozen group. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edge_node.serving_settings import Group


class ReleasesSettings(Group):
    channel: Literal["stable", "canary"] = "stable"
    """Channel that the alias follows."""
    evaluate: bool = True
    """Evaluate candidates for central on this node's environments."""
    max_answer_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of an answer in the node's own evaluations. Unset: an answer ends as it does for
    a client that sets no max_tokens, but a base that has not learnt to stop writes to the end of
    EDGE_SERVING__MAX_MODEL_LEN, and the evaluation takes as long. With a bound the verifier sees a
    cut answer: choose one above the longest right answer.
    """
    keep: int = Field(default=8, ge=2)
    """Newest release directories that stay loaded and on disk."""
    serve: Literal["release", "best"] = "release"
    """Which adapter answers the alias. best: the node's own newest one, while the local gate of its
    round found it better than the release that is served; else that release.
    """
    serve_keys: dict[str, Literal["release", "best"]] = Field(default_factory=dict)
    """The same for the requests of single access keys, by the key's name, as a JSON object. Give
    each environment or tenant a key of its own.
    """
    canary_share: float = Field(default=0, ge=0, le=1)
    """Share of this node's requests for the alias that the canary channel's release answers, while
    there is one: of keys and users where they are known, else of requests. With `channel: canary`
    the whole node follows that channel.
    """
    canary_keys: list[str] = Field(default_factory=list)
    """Names of access keys whose requests follow the canary channel, as a JSON list."""
    probation_s: float = Field(default=600, gt=0)
    """How long vLLM must serve a new release before it has proved itself."""
    crashes: int = Field(default=3, ge=1)
    """After so many ends of vLLM during a release's probation, the node serves the last release
    that proved itself, until central names another one.
    """
    proof: Literal["on", "checksums", "off"] = "on"
    """What the node compares before the alias points at a release that vLLM loaded. on: the weights
    in vLLM's workers with the release, and what vLLM serves with a PEFT reference, which a process
    of its own makes on the CPU, once for each release. checksums: the weights alone; so it is where
    the base does not fit into memory a second time. off: nothing.
    """
    max_rank: int | None = Field(default=None, ge=1)
    """Largest rank that this node serves (at most EDGE_SERVING__MAX_LORA_RANK). Of a larger release
    it serves the first pairs, which approximate it best. Unset: whole releases.
    """

    @model_validator(mode="after")
    def _one_way_to_follow_canary(self) -> ReleasesSettings:
        if self.channel == "canary" and (self.canary_share or self.canary_keys):
            raise ValueError(
                "channel is canary, which moves the whole node, and canary_share or canary_keys is "
                "set; expected one of them"
            )
        return self

    @property
    def may_serve_own(self) -> bool:
        """Some request may get the node's own adapter."""
        return "best" in (self.serve, *self.serve_keys.values())

    @property
    def has_canary(self) -> bool:
        """A part of the requests follows the canary channel."""
        return self.channel == "stable" and bool(self.canary_share or self.canary_keys)
