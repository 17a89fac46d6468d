"""Colocated: a prompt goes on as a decode row of the same batch, on the pages that it has, to its end."""

from engine.engine import Progress
from protos.v1 import worker_pb2
from worker.finish import finish_reason
from worker.prompt_request import PromptRequest
from worker.prompt_role import PromptRole


class ColocatedRole(PromptRole):
    """The colocated pool's side of worker.proto."""

    def _answer_len(self, message: worker_pb2.Prefill) -> int:
        return int(message.sampling.max_tokens)

    def _publish(self, request: PromptRequest, progress: Progress) -> None:
        sequence = request.sequence
        if progress.token is None:
            return
        update = worker_pb2.SequenceUpdate(request_id=sequence.request_id, token_ids=[progress.token])
        update.logprobs.extend(sequence.logprobs)
        sequence.logprobs.clear()
        if len(sequence.tokens) == sequence.prompt_len + 1:
            update.prefill.CopyFrom(request.report())
        if progress.finish is not None:
            update.finish_reason = finish_reason(progress.finish)
            self._end(sequence.request_id)
        self.emit(request.router_id, update)
