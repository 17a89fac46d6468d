from protos.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PageStoreDescription(_message.Message):
    __slots__ = ("store_id", "incarnation", "source", "following", "host", "disk", "counters")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    incarnation: int
    source: _worker_pb2.PageSource
    following: _containers.RepeatedScalarFieldContainer[str]
    host: StoreTier
    disk: StoreTier
    counters: PageStoreCounters
    def __init__(self, store_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., source: _Optional[_Union[_worker_pb2.PageSource, _Mapping]] = ..., following: _Optional[_Iterable[str]] = ..., host: _Optional[_Union[StoreTier, _Mapping]] = ..., disk: _Optional[_Union[StoreTier, _Mapping]] = ..., counters: _Optional[_Union[PageStoreCounters, _Mapping]] = ...) -> None: ...

class StoreTier(_message.Message):
    __slots__ = ("total_pages", "pages")
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    total_pages: int
    pages: int
    def __init__(self, total_pages: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class PageStoreCounters(_message.Message):
    __slots__ = ("arrived", "stale", "hits", "demoted", "promoted", "dropped", "dropped_corrupt", "disk_errors")
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    DEMOTED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    DISK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    arrived: int
    stale: int
    hits: int
    demoted: int
    promoted: int
    dropped: int
    dropped_corrupt: int
    disk_errors: int
    def __init__(self, arrived: _Optional[int] = ..., stale: _Optional[int] = ..., hits: _Optional[int] = ..., demoted: _Optional[int] = ..., promoted: _Optional[int] = ..., dropped: _Optional[int] = ..., dropped_corrupt: _Optional[int] = ..., disk_errors: _Optional[int] = ...) -> None: ...
