"""Prefill: admit, compute in chunks, name sealed pages, first token out, hold the pages until they are pulled."""

from engine.engine import Engine, Progress
from engine.sequence import Finish
from kvstore.pins import PinTable
from protos.v1 import worker_pb2
from worker.finish import finish_reason
from worker.prompt_request import PromptRequest
from worker.prompt_role import PromptRole
from worker.puller import Puller


class PrefillRole(PromptRole):
    """The prefill pool's side of worker.proto."""

    def __init__(self, engine: Engine, puller: Puller) -> None:
        super().__init__(engine, puller)
        self._pins = PinTable(self.pool)

    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        if message.WhichOneof("kind") == "release":
            self._end(message.release.request_id)
        else:
            super().handle(router_id, message)

    def expire(self, now: float) -> None:
        super().expire(now)
        self._pins.expire(now)

    def drop_router(self, router_id: str) -> None:
        super().drop_router(router_id)
        self._pins.drop_owner(router_id)

    def _answer_len(self, message: worker_pb2.Prefill) -> int:
        return 1

    def _fetched(self, request: PromptRequest) -> None:
        sealed = self._newly_sealed(request)
        self.emit(request.router_id, worker_pb2.SequenceUpdate(request_id=request.sequence.request_id, sealed=sealed))

    def _publish(self, request: PromptRequest, progress: Progress) -> None:
        sequence = request.sequence
        update = worker_pb2.SequenceUpdate(request_id=sequence.request_id)
        if progress.token is not None:
            update.token_ids.append(progress.token)
            update.logprobs.extend(sequence.logprobs)
            update.prefill.CopyFrom(request.report())
            self._hold(request, progress.finish, update)
        else:
            update.sealed.extend(self._newly_sealed(request))
        self.emit(request.router_id, update)

    def _hold(self, request: PromptRequest, finish: Finish | None, update: worker_pb2.SequenceUpdate) -> None:
        """Prefill is done: pin the pages for decode, or let them go where the first token was the whole answer."""
        sequence, scheduler = request.sequence, self.engine.scheduler
        del self._requests[sequence.request_id]
        scheduler.seal_tail(sequence)
        if finish is Finish.STOP or sequence.sampling.max_tokens == 1:
            update.finish_reason = finish_reason(finish or Finish.LENGTH)
        else:
            update.sealed.extend(self._newly_sealed(request))
            self._pins.hold(sequence.request_id, request.router_id, sequence.pages, request.deadline)
        scheduler.drop(sequence)

    def _newly_sealed(self, request: PromptRequest) -> list[worker_pb2.PageRef]:
        sequence = request.sequence
        first, request.named = request.named, sequence.sealed
        return self.name_pages(sequence.pages[first : sequence.sealed], first)

    def _end(self, request_id: str) -> None:
        super()._end(request_id)
        self._pins.release(request_id)
