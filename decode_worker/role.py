"""Decode: reserve, pull, verify, join the batch, stream."""

from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

from decode_worker.arrival import Arrival
from engine.engine import Engine
from kvstore.pool import OutOfPages
from kvstore.quota import OverQuota
from protos.errors import DeadlineExceeded, DiptychError, InvalidRequest, Overloaded
from protos.v1 import worker_pb2
from worker.finish import finish_reason
from worker.puller import Pulled, Puller
from worker.requests import sequence_of
from worker.role import Role

_PULL_S = 30.0  # a source that stalls for so long is taken for lost


class DecodeRole(Role):
    """The decode pool's side of worker.proto."""

    def __init__(self, engine: Engine, puller: Puller) -> None:
        super().__init__(engine, puller)
        self._config = engine.scheduler.config
        self._requests: dict[str, Arrival] = {}
        self._waiting: deque[Arrival] = deque()  # for room
        self._seated = 0  # admitted and not ended: what counts against max_sequences

    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("kind"):
            case "decode":
                self._reserve(router_id, message.decode)
            case "pages":
                self._with(message.pages.request_id, partial(self._name, pages=list(message.pages.pages)))
            case "start":
                self._with(message.start.request_id, partial(self._start, token=message.start.first_token))
            case "cancel":
                self._end(message.cancel.request_id)

    def step(self) -> None:
        for progress in self.engine.step():
            sequence = progress.sequence
            if progress.token is None:  # a part of what is computed again after a preemption
                continue
            update = worker_pb2.SequenceUpdate(request_id=sequence.request_id, token_ids=[progress.token])
            if sequence.logprobs:
                update.logprobs.extend(sequence.logprobs)
                sequence.logprobs.clear()
            self.emit(self._requests[sequence.request_id].router_id, update)
            if progress.finish is not None:
                update.finish_reason = finish_reason(progress.finish)
                self._end(sequence.request_id)
        self._admit()  # as sequences grow and end, less or more is expected of them

    def expire(self, now: float) -> None:
        for arrival in [arrival for arrival in self._requests.values() if arrival.deadline <= now]:
            if not arrival.ended:  # the room that another one left may have brought its end
                self._fail(arrival, DeadlineExceeded("the deadline passed during decode"))
        self.puller.close_idle(now)

    def drop_router(self, router_id: str) -> None:
        for request_id in [r for r, arrival in self._requests.items() if arrival.router_id == router_id]:
            self._end(request_id)

    def fail_running(self, error: DiptychError) -> None:
        for sequence in self.engine.scheduler.computing:
            self._fail(self._requests[sequence.request_id], error)

    def load(self) -> worker_pb2.WorkerLoad:
        load = self._pool_load()
        load.waiting += len(self._waiting)
        return load

    def _with(self, request_id: str, act: Callable[[Arrival], None]) -> None:
        """Do something to a request; a late message for one that ended means nothing, an error ends it."""
        arrival = self._requests.get(request_id)
        if arrival is None:
            return
        try:
            act(arrival)
        except DiptychError as error:
            self._fail(arrival, error)

    def _reserve(self, router_id: str, message: worker_pb2.Decode) -> None:
        try:
            self._check_new(message.request_id)
            sequence = sequence_of(message, message.sampling.max_tokens, self._config.page_size, self.pool)
            self.engine.scheduler.check_fits(sequence)
        except DiptychError as error:
            error.request_id = message.request_id
            self.emit_error(router_id, error)
            return
        arrival = Arrival(router_id, sequence, message.source, monotonic() + message.deadline_s)
        self._requests[message.request_id] = arrival
        self._waiting.append(arrival)
        self._admit()

    def _check_new(self, request_id: str) -> None:
        if request_id in self._requests:
            raise InvalidRequest("this request_id runs already", field="request_id", stage="decode")
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences wait already", stage="decode")

    def _admit(self) -> None:
        """Give room to those who wait, in order, behind those who were preempted and keep their places in the batch.

        Those whose tenant has had its share are passed by.
        """
        scheduler = self.engine.scheduler
        over = set(scheduler.over_quota)
        for arrival in list(self._waiting):
            sequence = arrival.sequence
            if self._seated >= self._config.max_sequences or any(s.quota not in over for s in scheduler.waiting):
                return
            if sequence.quota in over or arrival.admitted or arrival.ended:
                continue
            try:
                scheduler.admit(sequence, sequence.keys)
            except OverQuota:
                over.add(sequence.quota)
                continue
            except OutOfPages:
                return
            self._waiting.remove(arrival)
            self._seated += 1
            arrival.report.prefix_pages = sequence.prefix_pages
            self._with(arrival.request_id, self._pull)

    def _name(self, arrival: Arrival, pages: list[worker_pb2.PageRef]) -> None:
        arrival.named += pages
        self._pull(arrival)

    def _start(self, arrival: Arrival, token: int) -> None:
        if arrival.first_token is not None:
            raise InvalidRequest("its first token was named already", field="first_token", stage="hand_over")
        arrival.first_token = token
        self._join_if_complete(arrival)

    def _pull(self, arrival: Arrival) -> None:
        """Ask for the pages that were named, less those that we hold anyway."""
        if not arrival.admitted:
            return
        sequence = arrival.sequence
        refs = [ref for ref in arrival.named if ref.index >= sequence.prefix_pages]
        arrival.named.clear()
        if not refs:
            self._join_if_complete(arrival)  # we may hold all of them
            return
        missing = range(len(sequence.pages), arrival.prompt_pages(self._config.page_size))
        if arrival.joined or [ref.index for ref in refs] != list(missing[: len(refs)]):
            raise InvalidRequest("pages must be named in order, each once", field="pages", stage="hand_over")
        assert sequence.credit is not None
        into = [sequence.credit.take() for _ in refs]
        for page in into:
            self.pool.begin_fill(page)
        sequence.pages += into
        arrival.in_flight += 1
        timeout_s = min(_PULL_S, max(0.001, arrival.deadline - monotonic()))
        self.puller.pull(arrival.source, refs, into, timeout_s, partial(self._pulled, arrival))

    def _pulled(self, arrival: Arrival, result: Pulled) -> None:
        """A pull came back: its pages become visible only if every generation held."""
        arrival.in_flight -= 1
        if arrival.ended:
            self._free_when_quiet(arrival)
        elif result.error is not None:
            self._fail(arrival, result.error)
        else:
            arrival.report.pages += result.pages
            arrival.report.bytes += result.bytes
            arrival.report.pull_ms += result.ms
            arrival.report.transport = result.transport
            self._join_if_complete(arrival)

    def _join_if_complete(self, arrival: Arrival) -> None:
        sequence = arrival.sequence
        complete = len(sequence.pages) == arrival.prompt_pages(self._config.page_size)
        if arrival.joined or arrival.first_token is None or arrival.in_flight or not complete or not arrival.admitted:
            return
        self.engine.scheduler.advance(sequence, sequence.prompt_len)
        sequence.tokens.append(arrival.first_token)
        self.engine.scheduler.join(sequence)
        arrival.joined = True
        update = worker_pb2.SequenceUpdate(request_id=arrival.request_id, hand_over=arrival.report)
        self.emit(arrival.router_id, update)

    def _fail(self, arrival: Arrival, error: DiptychError) -> None:
        self._end(arrival.request_id)
        error.request_id, error.stage = arrival.request_id, error.stage or "decode"
        self.emit_error(arrival.router_id, error)

    def _end(self, request_id: str) -> None:
        """Forget a request, whatever its phase, and free what it holds as soon as no pull writes into it."""
        arrival = self._requests.pop(request_id, None)
        if arrival is None:
            return
        arrival.ended = True
        if arrival.admitted:
            self._seated -= 1
            self._free_when_quiet(arrival)
        else:
            self._waiting.remove(arrival)
        self._admit()

    def _free_when_quiet(self, arrival: Arrival) -> None:
        if arrival.in_flight == 0:
            self.engine.scheduler.drop(arrival.sequence)
            self._admit()
