from protos.releases.v1 import releases_pb2 as _releases_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("token_id", "token_secret", "csr_pem", "base_digest", "node_name")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    token_secret: str
    csr_pem: bytes
    base_digest: str
    node_name: str
    def __init__(self, token_id: _Optional[str] = ..., token_secret: _Optional[str] = ..., csr_pem: _Optional[bytes] = ..., base_digest: _Optional[str] = ..., node_name: _Optional[str] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("node_id", "cohort", "certificate_pem", "ca_pem", "release_key_pem", "genesis", "genesis_payload")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    GENESIS_FIELD_NUMBER: _ClassVar[int]
    GENESIS_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    cohort: str
    certificate_pem: bytes
    ca_pem: bytes
    release_key_pem: bytes
    genesis: _releases_pb2.SignedManifest
    genesis_payload: bytes
    def __init__(self, node_id: _Optional[str] = ..., cohort: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., release_key_pem: _Optional[bytes] = ..., genesis: _Optional[_Union[_releases_pb2.SignedManifest, _Mapping]] = ..., genesis_payload: _Optional[bytes] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("room", "text", "next_step", "since")
    ROOM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    room: str
    text: str
    next_step: str
    since: str
    def __init__(self, room: _Optional[str] = ..., text: _Optional[str] = ..., next_step: _Optional[str] = ..., since: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("serving_release_id", "software_version", "outbox_waiting", "outbox_held", "experiences", "environments", "problems", "channel", "release_problem", "max_release_rank", "unusable_experiences")
    class UnusableExperiencesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SERVING_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTBOX_WAITING_FIELD_NUMBER: _ClassVar[int]
    OUTBOX_HELD_FIELD_NUMBER: _ClassVar[int]
    EXPERIENCES_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    MAX_RELEASE_RANK_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_EXPERIENCES_FIELD_NUMBER: _ClassVar[int]
    serving_release_id: str
    software_version: str
    outbox_waiting: int
    outbox_held: int
    experiences: int
    environments: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    channel: str
    release_problem: str
    max_release_rank: int
    unusable_experiences: _containers.ScalarMap[str, int]
    def __init__(self, serving_release_id: _Optional[str] = ..., software_version: _Optional[str] = ..., outbox_waiting: _Optional[int] = ..., outbox_held: _Optional[int] = ..., experiences: _Optional[int] = ..., environments: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ..., channel: _Optional[str] = ..., release_problem: _Optional[str] = ..., max_release_rank: _Optional[int] = ..., unusable_experiences: _Optional[_Mapping[str, int]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: NodeStatus
    def __init__(self, status: _Optional[_Union[NodeStatus, _Mapping]] = ...) -> None: ...

class TrainOffer(_message.Message):
    __slots__ = ("offer_id", "max_rank", "encodings")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    offer_id: str
    max_rank: int
    encodings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, offer_id: _Optional[str] = ..., max_rank: _Optional[int] = ..., encodings: _Optional[_Iterable[str]] = ...) -> None: ...

class EnvironmentSuite(_message.Message):
    __slots__ = ("environment", "reference_id", "first_task", "tasks")
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TASK_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    environment: str
    reference_id: str
    first_task: int
    tasks: int
    def __init__(self, environment: _Optional[str] = ..., reference_id: _Optional[str] = ..., first_task: _Optional[int] = ..., tasks: _Optional[int] = ...) -> None: ...

class EvaluationOffer(_message.Message):
    __slots__ = ("offer_id", "candidate", "reference", "tasks", "deadline_s", "references", "suites", "only_suites", "attempts", "temperature")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    SUITES_FIELD_NUMBER: _ClassVar[int]
    ONLY_SUITES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    offer_id: str
    candidate: _releases_pb2.SignedManifest
    reference: _releases_pb2.SignedManifest
    tasks: int
    deadline_s: int
    references: _containers.RepeatedCompositeFieldContainer[_releases_pb2.SignedManifest]
    suites: _containers.RepeatedCompositeFieldContainer[EnvironmentSuite]
    only_suites: bool
    attempts: int
    temperature: float
    def __init__(self, offer_id: _Optional[str] = ..., candidate: _Optional[_Union[_releases_pb2.SignedManifest, _Mapping]] = ..., reference: _Optional[_Union[_releases_pb2.SignedManifest, _Mapping]] = ..., tasks: _Optional[int] = ..., deadline_s: _Optional[int] = ..., references: _Optional[_Iterable[_Union[_releases_pb2.SignedManifest, _Mapping]]] = ..., suites: _Optional[_Iterable[_Union[EnvironmentSuite, _Mapping]]] = ..., only_suites: _Optional[bool] = ..., attempts: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class ChannelHead(_message.Message):
    __slots__ = ("channel", "head")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    channel: str
    head: _releases_pb2.SignedManifest
    def __init__(self, channel: _Optional[str] = ..., head: _Optional[_Union[_releases_pb2.SignedManifest, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStanding(_message.Message):
    __slots__ = ("quarantine",)
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    quarantine: str
    def __init__(self, quarantine: _Optional[str] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("head", "train", "evaluation", "heartbeat", "standing")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    head: ChannelHead
    train: TrainOffer
    evaluation: EvaluationOffer
    heartbeat: Heartbeat
    standing: NodeStanding
    def __init__(self, head: _Optional[_Union[ChannelHead, _Mapping]] = ..., train: _Optional[_Union[TrainOffer, _Mapping]] = ..., evaluation: _Optional[_Union[EvaluationOffer, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., standing: _Optional[_Union[NodeStanding, _Mapping]] = ...) -> None: ...

class ReportStatusRequest(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: NodeStatus
    def __init__(self, status: _Optional[_Union[NodeStatus, _Mapping]] = ...) -> None: ...

class ReportStatusResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
