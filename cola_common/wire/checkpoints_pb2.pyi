from cola_common.wire import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("job", "after", "limit")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    job: str
    after: str
    limit: int
    def __init__(self, job: _Optional[str] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("data", "has_more")
    DATA_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    data: _containers.RepeatedCompositeFieldContainer[_types_pb2.Checkpoint]
    has_more: bool
    def __init__(self, data: _Optional[_Iterable[_Union[_types_pb2.Checkpoint, _Mapping]]] = ..., has_more: _Optional[bool] = ...) -> None: ...

class DownloadCheckpointRequest(_message.Message):
    __slots__ = ("id", "merged")
    ID_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    id: str
    merged: bool
    def __init__(self, id: _Optional[str] = ..., merged: _Optional[bool] = ...) -> None: ...

class CheckpointChunk(_message.Message):
    __slots__ = ("path", "file_bytes", "offset", "data", "checksum")
    PATH_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    path: str
    file_bytes: int
    offset: int
    data: bytes
    checksum: int
    def __init__(self, path: _Optional[str] = ..., file_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...
