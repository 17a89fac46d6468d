"""One try at a request on one worker that does both phases."""

from protos import errors
from protos.v1 import worker_pb2
from router.attempt import Attempt


class ColocatedAttempt(Attempt):
    """A colocated worker: nothing is handed over."""

    def start(self, deadline: float) -> None:
        """Ask for the whole answer. Raises `WorkerLost`."""
        worker = self._pair.prefill
        self._listen(worker, self._pair.compute_tokens, self._pair.job.likely_pages, self._pair.keys)
        worker.send(worker_pb2.RouterMessage(prefill=self._prefill(deadline)))
        self._sent_ms = self._elapsed_ms()

    def lost(self, pool: str, error: errors.DiptychError) -> None:
        """The worker's stream broke. The error names the phase, as the pool does not."""
        error.stage = self.stage
        super().lost(pool, error)

    def _on_update(self, pool: str, update: worker_pb2.SequenceUpdate) -> None:
        self._on_prompt(update)
        if self._first_token_seen and self.stage != "decode":
            self.stage = "decode"
            self._stats.decode_joined_ms = self._stats.first_token_ms
            self._stats.decode_worker = self._pair.decode.record.worker_id
        self._on_tokens(pool, update)
