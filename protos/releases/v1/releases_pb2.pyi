from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SignedManifest(_message.Message):
    __slots__ = ("manifest", "signature")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PairedOutcomes(_message.Message):
    __slots__ = ("both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed")
    BOTH_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_REFERENCE_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_CANDIDATE_PASSED_FIELD_NUMBER: _ClassVar[int]
    NEITHER_PASSED_FIELD_NUMBER: _ClassVar[int]
    both_passed: int
    only_reference_passed: int
    only_candidate_passed: int
    neither_passed: int
    def __init__(self, both_passed: _Optional[int] = ..., only_reference_passed: _Optional[int] = ..., only_candidate_passed: _Optional[int] = ..., neither_passed: _Optional[int] = ...) -> None: ...

class PairedLikelihood(_message.Message):
    __slots__ = ("documents", "tokens", "reference_mean", "candidate_mean", "difference_sum", "difference_square_sum")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_MEAN_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_MEAN_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_SUM_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_SQUARE_SUM_FIELD_NUMBER: _ClassVar[int]
    documents: int
    tokens: int
    reference_mean: float
    candidate_mean: float
    difference_sum: float
    difference_square_sum: float
    def __init__(self, documents: _Optional[int] = ..., tokens: _Optional[int] = ..., reference_mean: _Optional[float] = ..., candidate_mean: _Optional[float] = ..., difference_sum: _Optional[float] = ..., difference_square_sum: _Optional[float] = ...) -> None: ...

class EnvironmentResult(_message.Message):
    __slots__ = ("environment", "tasks_digest", "anchor", "both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed", "reference_id", "fallback_reason", "first_task", "attempts", "every_attempt", "likelihood")
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    TASKS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    BOTH_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_REFERENCE_PASSED_FIELD_NUMBER: _ClassVar[int]
    ONLY_CANDIDATE_PASSED_FIELD_NUMBER: _ClassVar[int]
    NEITHER_PASSED_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_TASK_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    EVERY_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    environment: str
    tasks_digest: str
    anchor: bool
    both_passed: int
    only_reference_passed: int
    only_candidate_passed: int
    neither_passed: int
    reference_id: str
    fallback_reason: str
    first_task: int
    attempts: int
    every_attempt: PairedOutcomes
    likelihood: PairedLikelihood
    def __init__(self, environment: _Optional[str] = ..., tasks_digest: _Optional[str] = ..., anchor: _Optional[bool] = ..., both_passed: _Optional[int] = ..., only_reference_passed: _Optional[int] = ..., only_candidate_passed: _Optional[int] = ..., neither_passed: _Optional[int] = ..., reference_id: _Optional[str] = ..., fallback_reason: _Optional[str] = ..., first_task: _Optional[int] = ..., attempts: _Optional[int] = ..., every_attempt: _Optional[_Union[PairedOutcomes, _Mapping]] = ..., likelihood: _Optional[_Union[PairedLikelihood, _Mapping]] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("channel",)
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    channel: str
    def __init__(self, channel: _Optional[str] = ...) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("head", "unix_time_s")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    UNIX_TIME_S_FIELD_NUMBER: _ClassVar[int]
    head: SignedManifest
    unix_time_s: int
    def __init__(self, head: _Optional[_Union[SignedManifest, _Mapping]] = ..., unix_time_s: _Optional[int] = ...) -> None: ...

class GetReleaseRequest(_message.Message):
    __slots__ = ("release_id",)
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    def __init__(self, release_id: _Optional[str] = ...) -> None: ...

class GetReleaseResponse(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: SignedManifest
    def __init__(self, release: _Optional[_Union[SignedManifest, _Mapping]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("release_id", "offset")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    offset: int
    def __init__(self, release_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class ReportEvaluationRequest(_message.Message):
    __slots__ = ("offer_id", "results", "abstain_reason")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_REASON_FIELD_NUMBER: _ClassVar[int]
    offer_id: str
    results: _containers.RepeatedCompositeFieldContainer[EnvironmentResult]
    abstain_reason: str
    def __init__(self, offer_id: _Optional[str] = ..., results: _Optional[_Iterable[_Union[EnvironmentResult, _Mapping]]] = ..., abstain_reason: _Optional[str] = ...) -> None: ...

class ReportEvaluationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
