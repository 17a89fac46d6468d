"""Prefill: admit, compute in chunks, name sealed pages, first token out, hold the pages until they are pulled."""

from dataclasses import dataclass, field
from time import monotonic

from engine.engine import Engine, Progress
from engine.sequence import Finish, Sequence
from kvstore.pins import PinTable
from protos.errors import DeadlineExceeded, DiptychError, InvalidRequest
from protos.v1 import worker_pb2
from worker.finish import finish_reason
from worker.requests import sequence_of
from worker.role import Role


@dataclass
class _Request:
    router_id: str
    sequence: Sequence
    deadline: float  # monotonic
    answer_len: int  # max_tokens as the client asked
    received: float = field(default_factory=monotonic)
    started: float = 0.0
    named: int = 0  # pages the router knows to be sealed


class PrefillRole(Role):
    """The prefill pool's side of worker.proto."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._requests: dict[str, _Request] = {}
        self._pins = PinTable(self.pool)

    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("kind"):
            case "prefill":
                self._admit(router_id, message.prefill)
            case "cancel":
                self._end(message.cancel.request_id)
            case "release":
                self._end(message.release.request_id)

    def step(self) -> None:
        now = monotonic()
        for progress in self.engine.step():
            self._publish(self._requests[progress.sequence.request_id], progress, now)

    def expire(self, now: float) -> None:
        for request_id in [r for r, request in self._requests.items() if request.deadline <= now]:
            router_id = self._requests[request_id].router_id
            self._end(request_id)
            late = DeadlineExceeded("the deadline passed during prefill", request_id=request_id, stage="prefill")
            self.emit_error(router_id, late)
        self._pins.expire(now)

    def drop_router(self, router_id: str) -> None:
        for request_id in [r for r, request in self._requests.items() if request.router_id == router_id]:
            self._end(request_id)
        self._pins.drop_owner(router_id)

    def fail_running(self, error: DiptychError) -> None:
        for sequence in list(self.engine.scheduler.running):
            router_id = self._requests[sequence.request_id].router_id
            self._end(sequence.request_id)
            self.emit_error(router_id, type(error)(error.message, request_id=sequence.request_id, stage="prefill"))

    def load(self) -> worker_pb2.WorkerLoad:
        return self._pool_load()

    def _admit(self, router_id: str, message: worker_pb2.Prefill) -> None:
        try:
            if message.request_id in self._requests:
                raise InvalidRequest("this request_id runs already", field="request_id", stage="prefill")
            sequence = sequence_of(message, answer_len=1, page_size=self.engine.scheduler.config.page_size)
            self.engine.scheduler.add(sequence)
        except DiptychError as error:
            error.request_id = message.request_id
            self.emit_error(router_id, error)
            return
        self._requests[message.request_id] = _Request(
            router_id, sequence, monotonic() + message.deadline_s, answer_len=message.sampling.max_tokens
        )

    def _publish(self, request: _Request, progress: Progress, started: float) -> None:
        sequence = request.sequence
        request.started = request.started or started
        update = worker_pb2.SequenceUpdate(request_id=sequence.request_id)
        if progress.token is not None:
            update.token_ids.append(progress.token)
            update.prefill.CopyFrom(self._report(request))
            self._hold(request, progress.finish, update)
        else:
            update.sealed.extend(self._newly_sealed(request))
        self.emit(request.router_id, update)

    def _hold(self, request: _Request, finish: Finish | None, update: worker_pb2.SequenceUpdate) -> None:
        """Prefill is done: pin the pages for decode, or let them go where the first token was the whole answer."""
        sequence, scheduler = request.sequence, self.engine.scheduler
        del self._requests[sequence.request_id]
        scheduler.seal_tail(sequence)
        if finish is Finish.STOP or request.answer_len == 1:
            update.finish_reason = finish_reason(finish or Finish.LENGTH)
        else:
            update.sealed.extend(self._newly_sealed(request))
            self._pins.hold(sequence.request_id, request.router_id, sequence.pages, request.deadline)
        scheduler.drop(sequence)

    def _newly_sealed(self, request: _Request) -> list[worker_pb2.PageRef]:
        sequence = request.sequence
        fresh = range(request.named, sequence.sealed)
        request.named = sequence.sealed
        return [
            worker_pb2.PageRef(
                index=index,
                page=sequence.pages[index],
                generation=self.pool.generation(sequence.pages[index]),
            )
            for index in fresh
        ]

    @staticmethod
    def _report(request: _Request) -> worker_pb2.PrefillReport:
        return worker_pb2.PrefillReport(
            queue_ms=(request.started - request.received) * 1e3,
            compute_ms=(monotonic() - request.started) * 1e3,
            prefix_pages=request.sequence.prefix_pages,
        )

    def _end(self, request_id: str) -> None:
        """Free what a request holds, whatever its phase. Unknown ids are late messages, and mean nothing."""
        if request := self._requests.pop(request_id, None):
            self.engine.scheduler.drop(request.sequence)
        self._pins.release(request_id)
