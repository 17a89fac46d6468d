"""What a worker of one pool does with a router's messages. A role lives in one thread: that of its `WorkerLoop`."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence

from engine.engine import Engine
from kvstore.pool import PageId
from protos.errors import DiptychError
from protos.v1 import worker_pb2
from rpc.status import to_detail
from worker.measurement import Measurement
from worker.page_checksums import PageChecksums
from worker.puller import Puller


def is_idle(load: worker_pb2.WorkerLoad) -> bool:
    """Whether nothing is held or promised for anyone."""
    promised = load.total_pages - load.available_pages
    return not (load.running or load.waiting or load.held_pages or promised)


class Role(ABC):
    """The base of all pools: one method a message, one a step, and the updates that they emit."""

    checksums: PageChecksums | None = None  # where pages are named with one

    def __init__(self, engine: Engine, puller: Puller) -> None:
        self.engine = engine
        self.pool = engine.scheduler.pool
        self.puller = puller
        self._updates: dict[str, list[worker_pb2.SequenceUpdate]] = defaultdict(list)

    @abstractmethod
    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        """Take one message. What is wrong with it is emitted as the request's error, not raised."""

    @abstractmethod
    def step(self) -> None:
        """Compute one engine step and emit what it gave."""

    @abstractmethod
    def expire(self, now: float) -> None:
        """Drop what is past its deadline. `now` is `time.monotonic()`."""

    @abstractmethod
    def drop_router(self, router_id: str) -> None:
        """Drop everything that was done for this router."""

    @abstractmethod
    def fail_running(self, error: DiptychError) -> None:
        """A step failed as a whole: end every sequence that was in it."""

    @abstractmethod
    def load(self) -> worker_pb2.WorkerLoad:
        """What placement needs to know."""

    def measure(
        self,
        request: worker_pb2.MeasureRequest,
        done: Callable[[worker_pb2.MeasureResponse | DiptychError], None],
    ) -> None:
        """Test how fast pages come from another pool; `done` gets the result. Raises `OutOfPages`."""
        Measurement(self.pool, self.puller, done).start(request.source, request.pages)

    def close(self) -> None:
        """End what runs beside the loop."""
        self.puller.close()

    def name_pages(self, pages: Sequence[PageId], first: int = 0) -> list[worker_pb2.PageRef]:
        """What a reader elsewhere needs to know of sealed pages; they are a prompt's from its page `first` on."""
        sums = self.checksums.of(pages) if self.checksums and pages else [0] * len(pages)
        return [
            worker_pb2.PageRef(index=first + index, page=page, generation=self.pool.generation(page), checksum=checksum)
            for index, (page, checksum) in enumerate(zip(pages, sums, strict=True))
        ]

    def emit(self, router_id: str, update: worker_pb2.SequenceUpdate) -> None:
        self._updates[router_id].append(update)

    def emit_error(self, router_id: str, error: DiptychError) -> None:
        """End a request, as far as this worker goes, with an error that carries the request's id."""
        self.emit(router_id, worker_pb2.SequenceUpdate(request_id=error.request_id, error=to_detail(error)))

    def take_updates(self) -> dict[str, list[worker_pb2.SequenceUpdate]]:
        """What was emitted since the last call, by router."""
        updates, self._updates = self._updates, defaultdict(list)
        return updates

    def _pool_load(self) -> worker_pb2.WorkerLoad:
        scheduler = self.engine.scheduler
        return worker_pb2.WorkerLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.arriving),
            queued_tokens=scheduler.queued_tokens,
            total_pages=self.pool.total_pages,
            available_pages=self.pool.available_pages,
            held_pages=self.pool.held_pages,
            tokens_per_s=self.engine.times.tokens_per_s,
            step_ms=self.engine.times.step_ms,
            preemptions=scheduler.preemptions,
        )
