"""Who is alive and who has which page: what routers ask and workers tell.

The directory is an index that can be lost: workers announce again, and what it says is checked where it is used.
A holder is one life of one worker. A page is filed under its family, the first page key of its prompt, so that one
place answers for a whole prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import msgpack

from kvstore.keys import PageKey
from kvstore.page_format import PageFormat
from protos.v1 import worker_pb2

STORE_POOL = "store"  # page stores stand beside the workers: they hold pages and compute nothing
ENTRY_TTL_S = 3600.0  # what has been neither announced nor found for so long is forgotten


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker tells of itself with each renewal of its lease."""

    worker_id: str
    incarnation: int
    pool: str  # prefill, decode, colocated, or STORE_POOL
    address: str  # host:port of its gRPC service
    model: str
    fingerprint: str
    format: PageFormat
    max_tokens: int  # longest sequence that fits, prompt and answer together
    endpoints: tuple[tuple[str, str], ...]  # transport and address, best first
    draining: bool = False
    load: dict[str, float | int] = field(default_factory=dict)
    pull_rates: dict[str, float] = field(default_factory=dict)  # bytes/s at which pages came to it, by transport

    @property
    def holder(self) -> str:
        """The name of this life of this worker."""
        return holder_name(self.worker_id, self.incarnation)

    @property
    def source(self) -> worker_pb2.PageSource:
        """Where its pages can be pulled from."""
        return worker_pb2.PageSource(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            format=self.format.to_proto(),
            endpoints=[worker_pb2.Endpoint(transport=name, address=address) for name, address in self.endpoints],
        )

    @property
    def host(self) -> str:
        """Where it runs."""
        return self.address.rpartition(":")[0]

    @property
    def transports(self) -> tuple[str, ...]:
        """By which its pages can be had, best first."""
        return tuple(transport for transport, _ in self.endpoints)

    def pack(self) -> bytes:
        """As msgpack."""
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> "WorkerRecord":
        """From msgpack; `ValueError` where it is no record. Fields that a newer version added are passed over."""
        try:
            raw = msgpack.unpackb(data)
            known = {name: raw[name] for name in cls.__dataclass_fields__}
            known["format"] = PageFormat(**known["format"])
            known["endpoints"] = tuple((str(name), str(address)) for name, address in known["endpoints"])
            return cls(**known)
        except (msgpack.exceptions.UnpackException, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no worker record: {error!r}") from error


def holder_name(worker_id: str, incarnation: int) -> str:
    """How a life of a worker is named in the directory."""
    return f"{worker_id}/{incarnation}"


class DirectoryReader(ABC):
    """The router's side. Every call raises `MetadataUnavailable` where the directory does not answer."""

    @abstractmethod
    async def workers(self) -> list[WorkerRecord]:
        """Those whose lease runs."""

    @abstractmethod
    async def lookup(self, keys: Sequence[PageKey]) -> dict[str, int]:
        """For each holder of a prompt's first page, how many of its leading pages it has. One round trip, no lease.

        Holders that died since their last announcement may be among them: compare with `workers`.
        """

    @abstractmethod
    async def ping(self) -> None:
        """Returns if the directory answers."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close connections."""


class DirectoryWriter(ABC):
    """The worker's side, for one thread. Every call raises `MetadataUnavailable` where there is no answer."""

    @abstractmethod
    def renew(self, record: WorkerRecord, ttl_s: float) -> bool:
        """Register, or renew the lease for `ttl_s`. True: this life was not known, so all it holds is to be told."""

    @abstractmethod
    def publish(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        """`holder` has these pages."""

    @abstractmethod
    def withdraw(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        """`holder` has these pages no more."""

    @abstractmethod
    def deregister(self, worker_id: str, incarnation: int) -> None:
        """End the lease."""

    @abstractmethod
    def close(self) -> None:
        """Close connections."""
