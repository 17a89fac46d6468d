"""What the roles that compute prompts share: admission, fetches, chunks, deadlines, errors."""

from abc import abstractmethod
from functools import partial
from time import monotonic

from engine.engine import Engine, Progress
from engine.sequence import Sequence
from protos.errors import DeadlineExceeded, DiptychError, InvalidRequest
from protos.v1 import worker_pb2
from worker.prefix_fetch import PrefixFetch
from worker.prompt_request import PromptRequest
from worker.puller import Puller
from worker.requests import sequence_of
from worker.role import Role

_SCORED_TOKENS = 4096  # of a prompt in one update: 20 log-probabilities each are 0.7 MB
# How long a prompt waits for pages that it could compute itself: as long as computing them here is predicted to take.
# So a holder that stalls delays it by no more than it was to save. The least is for connecting, and for a step that the
# holder is in when it is asked; the first is for a worker that has not measured its rate yet.
_LEAST_FETCH_S, _FIRST_FETCH_S, _MOST_FETCH_S = 0.25, 2.0, 10.0


class PromptRole(Role):
    """Takes `Prefill` messages; the subclass says how far a sequence goes here, and what the router is told of it."""

    def __init__(self, engine: Engine, puller: Puller) -> None:
        super().__init__(engine, puller)
        self._requests: dict[str, PromptRequest] = {}

    @abstractmethod
    def _answer_len(self, message: worker_pb2.Prefill) -> int:
        """How many tokens this worker is to sample, at most."""

    @abstractmethod
    def _publish(self, request: PromptRequest, progress: Progress) -> None:
        """Tell the router what a step did for a request, and free what it holds where it has ended here."""

    def _fetched(self, request: PromptRequest) -> None:
        """Pages of a request have arrived from their holder."""

    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("kind"):
            case "prefill":
                self._admit(router_id, message.prefill)
            case "cancel":
                self._end(message.cancel.request_id)

    def step(self) -> None:
        self._start_fetches()
        for progress in self.engine.step():
            request = self._requests[progress.sequence.request_id]
            request.started = request.started or progress.launched
            self._tell_scores(request)
            self._publish(request, progress)

    def expire(self, now: float) -> None:
        for request in [request for request in self._requests.values() if request.deadline <= now]:
            self._fail(request, DeadlineExceeded(f"the deadline passed during {request.stage}"))
        for request in self._requests.values():
            if request.fetch:
                request.fetch.expire(now)
        self.puller.close_idle(now)

    def drop_router(self, router_id: str) -> None:
        for request_id in [r for r, request in self._requests.items() if request.router_id == router_id]:
            self._end(request_id)

    def fail_running(self, error: DiptychError) -> None:
        for sequence in self.engine.scheduler.computing:
            self._fail(self._requests[sequence.request_id], type(error)(error.message))

    def load(self) -> worker_pb2.WorkerLoad:
        return self._pool_load()

    def _start_fetches(self) -> None:
        """Ask for pages that others hold as soon as there is room for them, so that they come while others compute."""
        scheduler = self.engine.scheduler
        scheduler.seat()
        for sequence in scheduler.arriving.copy():
            request = self._requests[sequence.request_id]
            if request.fetch is None:
                request.fetch = PrefixFetch(scheduler, sequence, partial(self._fetched, request))
                request.fetch.start(self.puller, request.order, self._fetch_limit_s(sequence))

    def _fetch_limit_s(self, sequence: Sequence) -> float:
        rate = self.engine.times.tokens_per_s
        if rate == 0.0:
            return _FIRST_FETCH_S
        tokens = (sequence.fetchable - len(sequence.pages)) * self.engine.scheduler.config.page_size
        return min(max(_LEAST_FETCH_S, tokens / rate), _MOST_FETCH_S)

    def _admit(self, router_id: str, message: worker_pb2.Prefill) -> None:
        try:
            if message.request_id in self._requests:
                raise InvalidRequest("this request_id runs already", field="request_id", stage="prefill")
            page_size = self.engine.scheduler.config.page_size
            sequence = sequence_of(message, self._answer_len(message), page_size, self.pool)
            if sequence.sampling.prompt_logprobs is None:  # else every position is computed
                sequence.fetchable = min(message.fetch.pages, (sequence.prompt_len - 1) // page_size)
            self.engine.scheduler.add(sequence)
        except DiptychError as error:
            error.request_id = message.request_id
            self.emit_error(router_id, error)
            return
        deadline = monotonic() + message.deadline_s
        self._requests[message.request_id] = PromptRequest(router_id, sequence, deadline, message.fetch)

    def _tell_scores(self, request: PromptRequest) -> None:
        """Log-probabilities of the prompt's tokens, in messages of bounded size."""
        sequence = request.sequence
        for start in range(0, len(sequence.prompt_logprobs), _SCORED_TOKENS):
            part = sequence.prompt_logprobs[start : start + _SCORED_TOKENS]
            update = worker_pb2.SequenceUpdate(request_id=sequence.request_id, prompt_logprobs=part)
            self.emit(request.router_id, update)
        sequence.prompt_logprobs.clear()

    def _fail(self, request: PromptRequest, error: DiptychError) -> None:
        error.request_id, error.stage = request.sequence.request_id, request.stage
        self._end(error.request_id)
        self.emit_error(request.router_id, error)

    def _end(self, request_id: str) -> None:
        """Free what a request holds, whatever its phase. Unknown ids are late messages, and mean nothing."""
        if request := self._requests.pop(request_id, None):
            if request.fetch:
                request.fetch.stop()
            self.engine.scheduler.drop(request.sequence)
