from protos.fleet.v1 import fleet_pb2 as _fleet_pb2
from protos.releases.v1 import releases_pb2 as _releases_pb2
from protos.updates.v1 import updates_pb2 as _updates_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReleaseState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_STATE_UNSPECIFIED: _ClassVar[ReleaseState]
    RELEASE_STATE_CANDIDATE: _ClassVar[ReleaseState]
    RELEASE_STATE_ACCEPTED: _ClassVar[ReleaseState]
    RELEASE_STATE_REJECTED: _ClassVar[ReleaseState]
    RELEASE_STATE_ABANDONED: _ClassVar[ReleaseState]
    RELEASE_STATE_WITHDRAWN: _ClassVar[ReleaseState]

class TokenState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_STATE_UNSPECIFIED: _ClassVar[TokenState]
    TOKEN_STATE_USABLE: _ClassVar[TokenState]
    TOKEN_STATE_USED_UP: _ClassVar[TokenState]
    TOKEN_STATE_EXPIRED: _ClassVar[TokenState]
    TOKEN_STATE_REVOKED: _ClassVar[TokenState]

class AbandonedUpdates(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABANDONED_UPDATES_UNSPECIFIED: _ClassVar[AbandonedUpdates]
    ABANDONED_UPDATES_REQUEUE: _ClassVar[AbandonedUpdates]
    ABANDONED_UPDATES_SET_ASIDE: _ClassVar[AbandonedUpdates]

class ForgetState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORGET_STATE_UNSPECIFIED: _ClassVar[ForgetState]
    FORGET_STATE_PROPOSED: _ClassVar[ForgetState]
    FORGET_STATE_ORDERED: _ClassVar[ForgetState]
    FORGET_STATE_PLANNED: _ClassVar[ForgetState]
    FORGET_STATE_DONE: _ClassVar[ForgetState]
    FORGET_STATE_REJECTED: _ClassVar[ForgetState]
    FORGET_STATE_FAILED: _ClassVar[ForgetState]
RELEASE_STATE_UNSPECIFIED: ReleaseState
RELEASE_STATE_CANDIDATE: ReleaseState
RELEASE_STATE_ACCEPTED: ReleaseState
RELEASE_STATE_REJECTED: ReleaseState
RELEASE_STATE_ABANDONED: ReleaseState
RELEASE_STATE_WITHDRAWN: ReleaseState
TOKEN_STATE_UNSPECIFIED: TokenState
TOKEN_STATE_USABLE: TokenState
TOKEN_STATE_USED_UP: TokenState
TOKEN_STATE_EXPIRED: TokenState
TOKEN_STATE_REVOKED: TokenState
ABANDONED_UPDATES_UNSPECIFIED: AbandonedUpdates
ABANDONED_UPDATES_REQUEUE: AbandonedUpdates
ABANDONED_UPDATES_SET_ASIDE: AbandonedUpdates
FORGET_STATE_UNSPECIFIED: ForgetState
FORGET_STATE_PROPOSED: ForgetState
FORGET_STATE_ORDERED: ForgetState
FORGET_STATE_PLANNED: ForgetState
FORGET_STATE_DONE: ForgetState
FORGET_STATE_REJECTED: ForgetState
FORGET_STATE_FAILED: ForgetState

class Node(_message.Message):
    __slots__ = ("node_id", "name", "cohort", "revoked", "connected", "last_seen", "status", "quarantine", "silent_since")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    SILENT_SINCE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    cohort: str
    revoked: bool
    connected: bool
    last_seen: str
    status: _fleet_pb2.NodeStatus
    quarantine: str
    silent_since: str
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., cohort: _Optional[str] = ..., revoked: _Optional[bool] = ..., connected: _Optional[bool] = ..., last_seen: _Optional[str] = ..., status: _Optional[_Union[_fleet_pb2.NodeStatus, _Mapping]] = ..., quarantine: _Optional[str] = ..., silent_since: _Optional[str] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("update_id", "node_id", "cohort", "sequence", "state", "start_release_id", "rank", "size_bytes", "admitted_at", "release_id", "reason")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    START_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    node_id: str
    cohort: str
    sequence: int
    state: _updates_pb2.UpdateState
    start_release_id: str
    rank: int
    size_bytes: int
    admitted_at: str
    release_id: str
    reason: str
    def __init__(self, update_id: _Optional[str] = ..., node_id: _Optional[str] = ..., cohort: _Optional[str] = ..., sequence: _Optional[int] = ..., state: _Optional[_Union[_updates_pb2.UpdateState, str]] = ..., start_release_id: _Optional[str] = ..., rank: _Optional[int] = ..., size_bytes: _Optional[int] = ..., admitted_at: _Optional[str] = ..., release_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class NodeVerdict(_message.Message):
    __slots__ = ("node_id", "results", "abstain_reason")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_REASON_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    results: _containers.RepeatedCompositeFieldContainer[_releases_pb2.EnvironmentResult]
    abstain_reason: str
    def __init__(self, node_id: _Optional[str] = ..., results: _Optional[_Iterable[_Union[_releases_pb2.EnvironmentResult, _Mapping]]] = ..., abstain_reason: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("release_id", "version", "cohort", "parent_id", "state", "channels", "created_at", "rank", "size_bytes", "truncation_error", "update_weights", "evaluations", "verdict", "soak", "builds_on_id", "continual")
    class UpdateWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    UPDATE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    SOAK_FIELD_NUMBER: _ClassVar[int]
    BUILDS_ON_ID_FIELD_NUMBER: _ClassVar[int]
    CONTINUAL_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    version: str
    cohort: str
    parent_id: str
    state: ReleaseState
    channels: _containers.RepeatedScalarFieldContainer[str]
    created_at: str
    rank: int
    size_bytes: int
    truncation_error: float
    update_weights: _containers.ScalarMap[str, float]
    evaluations: _containers.RepeatedCompositeFieldContainer[NodeVerdict]
    verdict: str
    soak: Soak
    builds_on_id: str
    continual: ContinualFigures
    def __init__(self, release_id: _Optional[str] = ..., version: _Optional[str] = ..., cohort: _Optional[str] = ..., parent_id: _Optional[str] = ..., state: _Optional[_Union[ReleaseState, str]] = ..., channels: _Optional[_Iterable[str]] = ..., created_at: _Optional[str] = ..., rank: _Optional[int] = ..., size_bytes: _Optional[int] = ..., truncation_error: _Optional[float] = ..., update_weights: _Optional[_Mapping[str, float]] = ..., evaluations: _Optional[_Iterable[_Union[NodeVerdict, _Mapping]]] = ..., verdict: _Optional[str] = ..., soak: _Optional[_Union[Soak, _Mapping]] = ..., builds_on_id: _Optional[str] = ..., continual: _Optional[_Union[ContinualFigures, _Mapping]] = ...) -> None: ...

class ContinualFigures(_message.Message):
    __slots__ = ("environments", "average", "backward_transfer", "forward_transfer", "forgetting", "worst_environment", "worst_best", "worst_now", "attempts", "every_attempt", "kl_release", "kl_updates")
    ENVIRONMENTS_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    FORGETTING_FIELD_NUMBER: _ClassVar[int]
    WORST_ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    WORST_BEST_FIELD_NUMBER: _ClassVar[int]
    WORST_NOW_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    EVERY_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KL_RELEASE_FIELD_NUMBER: _ClassVar[int]
    KL_UPDATES_FIELD_NUMBER: _ClassVar[int]
    environments: int
    average: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float
    worst_environment: str
    worst_best: float
    worst_now: float
    attempts: int
    every_attempt: float
    kl_release: float
    kl_updates: int
    def __init__(self, environments: _Optional[int] = ..., average: _Optional[float] = ..., backward_transfer: _Optional[float] = ..., forward_transfer: _Optional[float] = ..., forgetting: _Optional[float] = ..., worst_environment: _Optional[str] = ..., worst_best: _Optional[float] = ..., worst_now: _Optional[float] = ..., attempts: _Optional[int] = ..., every_attempt: _Optional[float] = ..., kl_release: _Optional[float] = ..., kl_updates: _Optional[int] = ...) -> None: ...

class Soak(_message.Message):
    __slots__ = ("since", "serving", "troubled", "promotes_at", "waits_for")
    class TroubledEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SINCE_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    TROUBLED_FIELD_NUMBER: _ClassVar[int]
    PROMOTES_AT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    since: str
    serving: _containers.RepeatedScalarFieldContainer[str]
    troubled: _containers.ScalarMap[str, str]
    promotes_at: str
    waits_for: str
    def __init__(self, since: _Optional[str] = ..., serving: _Optional[_Iterable[str]] = ..., troubled: _Optional[_Mapping[str, str]] = ..., promotes_at: _Optional[str] = ..., waits_for: _Optional[str] = ...) -> None: ...

class CanaryReport(_message.Message):
    __slots__ = ("node_id", "condition", "problem", "at")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    condition: str
    problem: str
    at: str
    def __init__(self, node_id: _Optional[str] = ..., condition: _Optional[str] = ..., problem: _Optional[str] = ..., at: _Optional[str] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("update_id", "node_id", "weight", "sequence", "start_release_id", "admitted_at", "factor")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    node_id: str
    weight: float
    sequence: int
    start_release_id: str
    admitted_at: str
    factor: float
    def __init__(self, update_id: _Optional[str] = ..., node_id: _Optional[str] = ..., weight: _Optional[float] = ..., sequence: _Optional[int] = ..., start_release_id: _Optional[str] = ..., admitted_at: _Optional[str] = ..., factor: _Optional[float] = ...) -> None: ...

class LeftOut(_message.Message):
    __slots__ = ("update_id", "node_id", "reason")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    node_id: str
    reason: str
    def __init__(self, update_id: _Optional[str] = ..., node_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class EnvironmentFinding(_message.Message):
    __slots__ = ("environment", "anchor", "both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed", "nodes", "fall_points", "tolerance_points", "p_reference", "fell", "reference_id", "standing", "p_fine", "better", "fallback_reason", "attempts", "every_attempt", "likelihood")
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    BOTH_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_REFERENCE_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_CANDIDATE_PASSED_FIELD_NUMBER: _ClassVar[int]
    NEITHER_PASSED_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    FALL_POINTS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_POINTS_FIELD_NUMBER: _ClassVar[int]
    P_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    FELL_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ID_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    P_FINE_FIELD_NUMBER: _ClassVar[int]
    BETTER_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    EVERY_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    environment: str
    anchor: bool
    both_passed: int
    only_reference_passed: int
    only_candidate_passed: int
    neither_passed: int
    nodes: int
    fall_points: float
    tolerance_points: float
    p_reference: float
    fell: bool
    reference_id: str
    standing: str
    p_fine: float
    better: bool
    fallback_reason: str
    attempts: int
    every_attempt: EveryAttemptFinding
    likelihood: LikelihoodFinding
    def __init__(self, environment: _Optional[str] = ..., anchor: _Optional[bool] = ..., both_passed: _Optional[int] = ..., only_reference_passed: _Optional[int] = ..., only_candidate_passed: _Optional[int] = ..., neither_passed: _Optional[int] = ..., nodes: _Optional[int] = ..., fall_points: _Optional[float] = ..., tolerance_points: _Optional[float] = ..., p_reference: _Optional[float] = ..., fell: _Optional[bool] = ..., reference_id: _Optional[str] = ..., standing: _Optional[str] = ..., p_fine: _Optional[float] = ..., better: _Optional[bool] = ..., fallback_reason: _Optional[str] = ..., attempts: _Optional[int] = ..., every_attempt: _Optional[_Union[EveryAttemptFinding, _Mapping]] = ..., likelihood: _Optional[_Union[LikelihoodFinding, _Mapping]] = ...) -> None: ...

class LikelihoodFinding(_message.Message):
    __slots__ = ("outcomes", "fall_nats", "tolerance_nats")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    FALL_NATS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_NATS_FIELD_NUMBER: _ClassVar[int]
    outcomes: _releases_pb2.PairedLikelihood
    fall_nats: float
    tolerance_nats: float
    def __init__(self, outcomes: _Optional[_Union[_releases_pb2.PairedLikelihood, _Mapping]] = ..., fall_nats: _Optional[float] = ..., tolerance_nats: _Optional[float] = ...) -> None: ...

class EveryAttemptFinding(_message.Message):
    __slots__ = ("outcomes", "fall_points", "p_reference", "p_fine")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    FALL_POINTS_FIELD_NUMBER: _ClassVar[int]
    P_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    P_FINE_FIELD_NUMBER: _ClassVar[int]
    outcomes: _releases_pb2.PairedOutcomes
    fall_points: float
    p_reference: float
    p_fine: float
    def __init__(self, outcomes: _Optional[_Union[_releases_pb2.PairedOutcomes, _Mapping]] = ..., fall_points: _Optional[float] = ..., p_reference: _Optional[float] = ..., p_fine: _Optional[float] = ...) -> None: ...

class ChannelPeriod(_message.Message):
    __slots__ = ("channel", "since", "until", "by")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    channel: str
    since: str
    until: str
    by: str
    def __init__(self, channel: _Optional[str] = ..., since: _Optional[str] = ..., until: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class ServedPeriod(_message.Message):
    __slots__ = ("node_id", "since", "until")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    since: str
    until: str
    def __init__(self, node_id: _Optional[str] = ..., since: _Optional[str] = ..., until: _Optional[str] = ...) -> None: ...

class ServingNode(_message.Message):
    __slots__ = ("node_id", "connected", "last_seen")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    connected: bool
    last_seen: str
    def __init__(self, node_id: _Optional[str] = ..., connected: _Optional[bool] = ..., last_seen: _Optional[str] = ...) -> None: ...

class ModuleChange(_message.Message):
    __slots__ = ("module", "norm_a", "norm_b", "relative_change")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    NORM_A_FIELD_NUMBER: _ClassVar[int]
    NORM_B_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    module: str
    norm_a: float
    norm_b: float
    relative_change: float
    def __init__(self, module: _Optional[str] = ..., norm_a: _Optional[float] = ..., norm_b: _Optional[float] = ..., relative_change: _Optional[float] = ...) -> None: ...

class EnvironmentChange(_message.Message):
    __slots__ = ("environment", "passed_a", "total_a", "passed_b", "total_b", "likelihood_a", "likelihood_b")
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    PASSED_A_FIELD_NUMBER: _ClassVar[int]
    TOTAL_A_FIELD_NUMBER: _ClassVar[int]
    PASSED_B_FIELD_NUMBER: _ClassVar[int]
    TOTAL_B_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_A_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_B_FIELD_NUMBER: _ClassVar[int]
    environment: str
    passed_a: int
    total_a: int
    passed_b: int
    total_b: int
    likelihood_a: MeanLikelihood
    likelihood_b: MeanLikelihood
    def __init__(self, environment: _Optional[str] = ..., passed_a: _Optional[int] = ..., total_a: _Optional[int] = ..., passed_b: _Optional[int] = ..., total_b: _Optional[int] = ..., likelihood_a: _Optional[_Union[MeanLikelihood, _Mapping]] = ..., likelihood_b: _Optional[_Union[MeanLikelihood, _Mapping]] = ...) -> None: ...

class MeanLikelihood(_message.Message):
    __slots__ = ("mean", "documents")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    mean: float
    documents: int
    def __init__(self, mean: _Optional[float] = ..., documents: _Optional[int] = ...) -> None: ...

class JournalEvent(_message.Message):
    __slots__ = ("sequence", "at", "kind", "cohort", "subject", "body", "hash")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: str
    kind: str
    cohort: str
    subject: str
    body: str
    hash: str
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[str] = ..., kind: _Optional[str] = ..., cohort: _Optional[str] = ..., subject: _Optional[str] = ..., body: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("cohort", "uses", "valid_s", "readmit_node_id")
    COHORT_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    VALID_S_FIELD_NUMBER: _ClassVar[int]
    READMIT_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    uses: int
    valid_s: int
    readmit_node_id: str
    def __init__(self, cohort: _Optional[str] = ..., uses: _Optional[int] = ..., valid_s: _Optional[int] = ..., readmit_node_id: _Optional[str] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "token_id")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_id: str
    def __init__(self, token: _Optional[str] = ..., token_id: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "cohort", "state", "uses", "used", "created_at", "expires_at", "node_ids", "readmits", "reason")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    READMITS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    cohort: str
    state: TokenState
    uses: int
    used: int
    created_at: str
    expires_at: str
    node_ids: _containers.RepeatedScalarFieldContainer[str]
    readmits: str
    reason: str
    def __init__(self, token_id: _Optional[str] = ..., cohort: _Optional[str] = ..., state: _Optional[_Union[TokenState, str]] = ..., uses: _Optional[int] = ..., used: _Optional[int] = ..., created_at: _Optional[str] = ..., expires_at: _Optional[str] = ..., node_ids: _Optional[_Iterable[str]] = ..., readmits: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListTokensRequest(_message.Message):
    __slots__ = ("cohort",)
    COHORT_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    def __init__(self, cohort: _Optional[str] = ...) -> None: ...

class ListTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("token_id",)
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    def __init__(self, token_id: _Optional[str] = ...) -> None: ...

class RevokeTokenResponse(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: Token
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ...) -> None: ...

class RevokeNodeRequest(_message.Message):
    __slots__ = ("node_id",)
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    def __init__(self, node_id: _Optional[str] = ...) -> None: ...

class RevokeNodeResponse(_message.Message):
    __slots__ = ("token_id", "ended_uses", "other_node_ids")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ENDED_USES_FIELD_NUMBER: _ClassVar[int]
    OTHER_NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    ended_uses: int
    other_node_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_id: _Optional[str] = ..., ended_uses: _Optional[int] = ..., other_node_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("cohort",)
    COHORT_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    def __init__(self, cohort: _Optional[str] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases", "standstills", "merging")
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    STANDSTILLS_FIELD_NUMBER: _ClassVar[int]
    MERGING_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    standstills: _containers.RepeatedCompositeFieldContainer[Standstill]
    merging: _containers.RepeatedCompositeFieldContainer[MergeUnderWay]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., standstills: _Optional[_Iterable[_Union[Standstill, _Mapping]]] = ..., merging: _Optional[_Iterable[_Union[MergeUnderWay, _Mapping]]] = ...) -> None: ...

class MergeUnderWay(_message.Message):
    __slots__ = ("cohort", "progress")
    COHORT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    progress: str
    def __init__(self, cohort: _Optional[str] = ..., progress: _Optional[str] = ...) -> None: ...

class Standstill(_message.Message):
    __slots__ = ("cohort", "reason")
    COHORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    reason: str
    def __init__(self, cohort: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetReleaseRequest(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: str
    def __init__(self, release: _Optional[str] = ...) -> None: ...

class GetReleaseResponse(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: Release
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class ExplainReleaseRequest(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: str
    def __init__(self, release: _Optional[str] = ...) -> None: ...

class ExplainReleaseResponse(_message.Message):
    __slots__ = ("release", "contributions", "environments", "periods", "serving", "decided_at", "strategy", "server_step", "software", "updates_in_lineage", "part_of", "canary_reports", "builds_on_version", "builds_on_state", "removed", "exactness", "served", "fate", "forgotten_update_ids", "filter", "left_out")
    class UpdatesInLineageEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENTS_FIELD_NUMBER: _ClassVar[int]
    PERIODS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    DECIDED_AT_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    SERVER_STEP_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    UPDATES_IN_LINEAGE_FIELD_NUMBER: _ClassVar[int]
    PART_OF_FIELD_NUMBER: _ClassVar[int]
    CANARY_REPORTS_FIELD_NUMBER: _ClassVar[int]
    BUILDS_ON_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUILDS_ON_STATE_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_UPDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    release: Release
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    environments: _containers.RepeatedCompositeFieldContainer[EnvironmentFinding]
    periods: _containers.RepeatedCompositeFieldContainer[ChannelPeriod]
    serving: _containers.RepeatedCompositeFieldContainer[ServingNode]
    decided_at: str
    strategy: str
    server_step: float
    software: str
    updates_in_lineage: _containers.ScalarMap[str, int]
    part_of: str
    canary_reports: _containers.RepeatedCompositeFieldContainer[CanaryReport]
    builds_on_version: str
    builds_on_state: ReleaseState
    removed: _containers.RepeatedCompositeFieldContainer[Contribution]
    exactness: str
    served: _containers.RepeatedCompositeFieldContainer[ServedPeriod]
    fate: str
    forgotten_update_ids: _containers.RepeatedScalarFieldContainer[str]
    filter: str
    left_out: _containers.RepeatedCompositeFieldContainer[LeftOut]
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., environments: _Optional[_Iterable[_Union[EnvironmentFinding, _Mapping]]] = ..., periods: _Optional[_Iterable[_Union[ChannelPeriod, _Mapping]]] = ..., serving: _Optional[_Iterable[_Union[ServingNode, _Mapping]]] = ..., decided_at: _Optional[str] = ..., strategy: _Optional[str] = ..., server_step: _Optional[float] = ..., software: _Optional[str] = ..., updates_in_lineage: _Optional[_Mapping[str, int]] = ..., part_of: _Optional[str] = ..., canary_reports: _Optional[_Iterable[_Union[CanaryReport, _Mapping]]] = ..., builds_on_version: _Optional[str] = ..., builds_on_state: _Optional[_Union[ReleaseState, str]] = ..., removed: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., exactness: _Optional[str] = ..., served: _Optional[_Iterable[_Union[ServedPeriod, _Mapping]]] = ..., fate: _Optional[str] = ..., forgotten_update_ids: _Optional[_Iterable[str]] = ..., filter: _Optional[str] = ..., left_out: _Optional[_Iterable[_Union[LeftOut, _Mapping]]] = ...) -> None: ...

class DiffReleasesRequest(_message.Message):
    __slots__ = ("release_a", "release_b")
    RELEASE_A_FIELD_NUMBER: _ClassVar[int]
    RELEASE_B_FIELD_NUMBER: _ClassVar[int]
    release_a: str
    release_b: str
    def __init__(self, release_a: _Optional[str] = ..., release_b: _Optional[str] = ...) -> None: ...

class DiffReleasesResponse(_message.Message):
    __slots__ = ("version_a", "version_b", "added", "removed", "modules", "all_modules", "environments")
    VERSION_A_FIELD_NUMBER: _ClassVar[int]
    VERSION_B_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    ALL_MODULES_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENTS_FIELD_NUMBER: _ClassVar[int]
    version_a: str
    version_b: str
    added: _containers.RepeatedCompositeFieldContainer[Update]
    removed: _containers.RepeatedCompositeFieldContainer[Update]
    modules: _containers.RepeatedCompositeFieldContainer[ModuleChange]
    all_modules: ModuleChange
    environments: _containers.RepeatedCompositeFieldContainer[EnvironmentChange]
    def __init__(self, version_a: _Optional[str] = ..., version_b: _Optional[str] = ..., added: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., modules: _Optional[_Iterable[_Union[ModuleChange, _Mapping]]] = ..., all_modules: _Optional[_Union[ModuleChange, _Mapping]] = ..., environments: _Optional[_Iterable[_Union[EnvironmentChange, _Mapping]]] = ...) -> None: ...

class PromoteReleaseRequest(_message.Message):
    __slots__ = ("release", "channel")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    release: str
    channel: str
    def __init__(self, release: _Optional[str] = ..., channel: _Optional[str] = ...) -> None: ...

class PromoteReleaseResponse(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: Release
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class RollbackReleaseRequest(_message.Message):
    __slots__ = ("cohort", "release", "updates", "channel")
    COHORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    release: str
    updates: AbandonedUpdates
    channel: str
    def __init__(self, cohort: _Optional[str] = ..., release: _Optional[str] = ..., updates: _Optional[_Union[AbandonedUpdates, str]] = ..., channel: _Optional[str] = ...) -> None: ...

class RollbackReleaseResponse(_message.Message):
    __slots__ = ("release", "abandoned_release_ids", "updates")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_RELEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    release: Release
    abandoned_release_ids: _containers.RepeatedScalarFieldContainer[str]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ..., abandoned_release_ids: _Optional[_Iterable[str]] = ..., updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class ListUpdatesRequest(_message.Message):
    __slots__ = ("cohort", "node_id")
    COHORT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    cohort: str
    node_id: str
    def __init__(self, cohort: _Optional[str] = ..., node_id: _Optional[str] = ...) -> None: ...

class ListUpdatesResponse(_message.Message):
    __slots__ = ("updates", "standstills")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    STANDSTILLS_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    standstills: _containers.RepeatedCompositeFieldContainer[Standstill]
    def __init__(self, updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., standstills: _Optional[_Iterable[_Union[Standstill, _Mapping]]] = ...) -> None: ...

class RequeueUpdatesRequest(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, updates: _Optional[_Iterable[str]] = ...) -> None: ...

class RequeueUpdatesResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class SetAsideUpdatesRequest(_message.Message):
    __slots__ = ("updates", "reason")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    def __init__(self, updates: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ...) -> None: ...

class SetAsideUpdatesResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class QuarantineNodeRequest(_message.Message):
    __slots__ = ("node_id", "reason")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    reason: str
    def __init__(self, node_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class QuarantineNodeResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class ReleaseNodeRequest(_message.Message):
    __slots__ = ("node_id",)
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    def __init__(self, node_id: _Optional[str] = ...) -> None: ...

class ReleaseNodeResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class ForgetOrder(_message.Message):
    __slots__ = ("order_id", "cohort", "node_id", "state", "in_release", "unreleased", "exactness", "merges", "candidate", "verdict", "accept_loss", "by", "at", "holders", "composed_cohorts", "waits_for")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IN_RELEASE_FIELD_NUMBER: _ClassVar[int]
    UNRELEASED_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_LOSS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    COMPOSED_COHORTS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    cohort: str
    node_id: str
    state: ForgetState
    in_release: _containers.RepeatedCompositeFieldContainer[Update]
    unreleased: _containers.RepeatedCompositeFieldContainer[Update]
    exactness: str
    merges: int
    candidate: str
    verdict: str
    accept_loss: bool
    by: str
    at: str
    holders: _containers.RepeatedScalarFieldContainer[str]
    composed_cohorts: _containers.RepeatedScalarFieldContainer[str]
    waits_for: str
    def __init__(self, order_id: _Optional[str] = ..., cohort: _Optional[str] = ..., node_id: _Optional[str] = ..., state: _Optional[_Union[ForgetState, str]] = ..., in_release: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., unreleased: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., exactness: _Optional[str] = ..., merges: _Optional[int] = ..., candidate: _Optional[str] = ..., verdict: _Optional[str] = ..., accept_loss: _Optional[bool] = ..., by: _Optional[str] = ..., at: _Optional[str] = ..., holders: _Optional[_Iterable[str]] = ..., composed_cohorts: _Optional[_Iterable[str]] = ..., waits_for: _Optional[str] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("target", "accept_loss", "dry_run", "cancel")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_LOSS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    target: str
    accept_loss: bool
    dry_run: bool
    cancel: bool
    def __init__(self, target: _Optional[str] = ..., accept_loss: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., cancel: _Optional[bool] = ...) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: ForgetOrder
    def __init__(self, order: _Optional[_Union[ForgetOrder, _Mapping]] = ...) -> None: ...

class ListForgetsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListForgetsResponse(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: _containers.RepeatedCompositeFieldContainer[ForgetOrder]
    def __init__(self, orders: _Optional[_Iterable[_Union[ForgetOrder, _Mapping]]] = ...) -> None: ...

class CollectedBlob(_message.Message):
    __slots__ = ("digest", "size_bytes", "reason")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    reason: str
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CollectBlobsRequest(_message.Message):
    __slots__ = ("apply",)
    APPLY_FIELD_NUMBER: _ClassVar[int]
    apply: bool
    def __init__(self, apply: _Optional[bool] = ...) -> None: ...

class CollectBlobsResponse(_message.Message):
    __slots__ = ("blobs", "uploads", "upload_bytes", "total_bytes")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[CollectedBlob]
    uploads: int
    upload_bytes: int
    total_bytes: int
    def __init__(self, blobs: _Optional[_Iterable[_Union[CollectedBlob, _Mapping]]] = ..., uploads: _Optional[int] = ..., upload_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[JournalEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[JournalEvent, _Mapping]]] = ...) -> None: ...
