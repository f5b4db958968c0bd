from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STATE_UNSPECIFIED: _ClassVar[UpdateState]
    UPDATE_STATE_WAITING: _ClassVar[UpdateState]
    UPDATE_STATE_PLANNED: _ClassVar[UpdateState]
    UPDATE_STATE_MERGED: _ClassVar[UpdateState]
    UPDATE_STATE_SUPERSEDED: _ClassVar[UpdateState]
    UPDATE_STATE_SET_ASIDE: _ClassVar[UpdateState]
    UPDATE_STATE_QUARANTINED: _ClassVar[UpdateState]
    UPDATE_STATE_FORGOTTEN: _ClassVar[UpdateState]
UPDATE_STATE_UNSPECIFIED: UpdateState
UPDATE_STATE_WAITING: UpdateState
UPDATE_STATE_PLANNED: UpdateState
UPDATE_STATE_MERGED: UpdateState
UPDATE_STATE_SUPERSEDED: UpdateState
UPDATE_STATE_SET_ASIDE: UpdateState
UPDATE_STATE_QUARANTINED: UpdateState
UPDATE_STATE_FORGOTTEN: UpdateState

class UploadHeader(_message.Message):
    __slots__ = ("manifest", "signature", "offset")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    offset: int
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    def __init__(self, receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class QueryUploadRequest(_message.Message):
    __slots__ = ("update_id",)
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    def __init__(self, update_id: _Optional[str] = ...) -> None: ...

class QueryUploadResponse(_message.Message):
    __slots__ = ("committed_bytes", "receipt", "state")
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    committed_bytes: int
    receipt: Receipt
    state: UpdateState
    def __init__(self, committed_bytes: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., state: _Optional[_Union[UpdateState, str]] = ...) -> None: ...
