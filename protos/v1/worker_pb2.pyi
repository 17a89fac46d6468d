from protos.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LocateRequest(_message.Message):
    __slots__ = ("page_keys",)
    PAGE_KEYS_FIELD_NUMBER: _ClassVar[int]
    page_keys: bytes
    def __init__(self, page_keys: _Optional[bytes] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedCompositeFieldContainer[PageRef]
    def __init__(self, pages: _Optional[_Iterable[_Union[PageRef, _Mapping]]] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SealedPages(_message.Message):
    __slots__ = ("pages",)
    class Page(_message.Message):
        __slots__ = ("key", "family", "ref", "parent")
        KEY_FIELD_NUMBER: _ClassVar[int]
        FAMILY_FIELD_NUMBER: _ClassVar[int]
        REF_FIELD_NUMBER: _ClassVar[int]
        PARENT_FIELD_NUMBER: _ClassVar[int]
        key: bytes
        family: bytes
        ref: PageRef
        parent: bytes
        def __init__(self, key: _Optional[bytes] = ..., family: _Optional[bytes] = ..., ref: _Optional[_Union[PageRef, _Mapping]] = ..., parent: _Optional[bytes] = ...) -> None: ...
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedCompositeFieldContainer[SealedPages.Page]
    def __init__(self, pages: _Optional[_Iterable[_Union[SealedPages.Page, _Mapping]]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "prefill", "decode", "pages", "start", "cancel", "release")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    prefill: Prefill
    decode: Decode
    pages: Pages
    start: Start
    cancel: Cancel
    release: Release
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., prefill: _Optional[_Union[Prefill, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ..., pages: _Optional[_Union[Pages, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("request_id", "token_ids", "page_keys", "sampling", "end_token_ids", "deadline_s", "fetch", "root_key", "max_pages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_KEYS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    ROOT_KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    page_keys: bytes
    sampling: _common_pb2.SamplingParams
    end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    fetch: Fetch
    root_key: bytes
    max_pages: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., page_keys: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., end_token_ids: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., root_key: _Optional[bytes] = ..., max_pages: _Optional[int] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("source", "address", "pages")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    source: PageSource
    address: str
    pages: int
    def __init__(self, source: _Optional[_Union[PageSource, _Mapping]] = ..., address: _Optional[str] = ..., pages: _Optional[int] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("request_id", "token_ids", "page_keys", "sampling", "end_token_ids", "deadline_s", "source", "root_key", "max_pages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_KEYS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ROOT_KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    page_keys: bytes
    sampling: _common_pb2.SamplingParams
    end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    source: PageSource
    root_key: bytes
    max_pages: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., page_keys: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., end_token_ids: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ..., source: _Optional[_Union[PageSource, _Mapping]] = ..., root_key: _Optional[bytes] = ..., max_pages: _Optional[int] = ...) -> None: ...

class PageSource(_message.Message):
    __slots__ = ("worker_id", "incarnation", "format", "endpoints")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    format: _common_pb2.PageFormat
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., format: _Optional[_Union[_common_pb2.PageFormat, _Mapping]] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("transport", "address")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    address: str
    def __init__(self, transport: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class PageRef(_message.Message):
    __slots__ = ("index", "page", "generation", "checksum")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    index: int
    page: int
    generation: int
    checksum: int
    def __init__(self, index: _Optional[int] = ..., page: _Optional[int] = ..., generation: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Pages(_message.Message):
    __slots__ = ("request_id", "pages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    pages: _containers.RepeatedCompositeFieldContainer[PageRef]
    def __init__(self, request_id: _Optional[str] = ..., pages: _Optional[_Iterable[_Union[PageRef, _Mapping]]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("request_id", "first_token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    first_token: int
    def __init__(self, request_id: _Optional[str] = ..., first_token: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "step")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerDescription
    step: Step
    def __init__(self, hello: _Optional[_Union[WorkerDescription, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("updates", "load")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    load: WorkerLoad
    def __init__(self, updates: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("request_id", "token_ids", "finish_reason", "sealed", "prefill", "hand_over", "error", "logprobs", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: _common_pb2.FinishReason
    sealed: _containers.RepeatedCompositeFieldContainer[PageRef]
    prefill: PrefillReport
    hand_over: HandOverReport
    error: _common_pb2.ErrorDetail
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., sealed: _Optional[_Iterable[_Union[PageRef, _Mapping]]] = ..., prefill: _Optional[_Union[PrefillReport, _Mapping]] = ..., hand_over: _Optional[_Union[HandOverReport, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class PrefillReport(_message.Message):
    __slots__ = ("queue_ms", "compute_ms", "prefix_pages", "fetched_pages", "fetch_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PAGES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    compute_ms: float
    prefix_pages: int
    fetched_pages: int
    fetch_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., prefix_pages: _Optional[int] = ..., fetched_pages: _Optional[int] = ..., fetch_ms: _Optional[float] = ...) -> None: ...

class HandOverReport(_message.Message):
    __slots__ = ("pages", "bytes", "pull_ms", "prefix_pages", "transport")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_MS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    pages: int
    bytes: int
    pull_ms: float
    prefix_pages: int
    transport: str
    def __init__(self, pages: _Optional[int] = ..., bytes: _Optional[int] = ..., pull_ms: _Optional[float] = ..., prefix_pages: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "total_pages", "available_pages", "held_pages", "tokens_per_s", "step_ms", "preemptions")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_PAGES_FIELD_NUMBER: _ClassVar[int]
    HELD_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    total_pages: int
    available_pages: int
    held_pages: int
    tokens_per_s: float
    step_ms: float
    preemptions: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., total_pages: _Optional[int] = ..., available_pages: _Optional[int] = ..., held_pages: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., step_ms: _Optional[float] = ..., preemptions: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("worker_id", "incarnation", "pool", "model", "fingerprint", "source", "max_tokens", "load", "draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    pool: str
    model: str
    fingerprint: str
    source: PageSource
    max_tokens: int
    load: WorkerLoad
    draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., pool: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., source: _Optional[_Union[PageSource, _Mapping]] = ..., max_tokens: _Optional[int] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...

class LendResponse(_message.Message):
    __slots__ = ("source", "pages")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    source: PageSource
    pages: _containers.RepeatedCompositeFieldContainer[PageRef]
    def __init__(self, source: _Optional[_Union[PageSource, _Mapping]] = ..., pages: _Optional[_Iterable[_Union[PageRef, _Mapping]]] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("source", "pages")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    source: PageSource
    pages: _containers.RepeatedCompositeFieldContainer[PageRef]
    def __init__(self, source: _Optional[_Union[PageSource, _Mapping]] = ..., pages: _Optional[_Iterable[_Union[PageRef, _Mapping]]] = ...) -> None: ...

class MeasureResponse(_message.Message):
    __slots__ = ("transport", "passed_over", "page_ms", "pull_ms", "bytes")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    PAGE_MS_FIELD_NUMBER: _ClassVar[int]
    PULL_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    transport: str
    passed_over: str
    page_ms: float
    pull_ms: float
    bytes: int
    def __init__(self, transport: _Optional[str] = ..., passed_over: _Optional[str] = ..., page_ms: _Optional[float] = ..., pull_ms: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...
