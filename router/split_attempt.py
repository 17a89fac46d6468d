"""One try at a request on a pair of workers: prefill computes the prompt, decode pulls its pages and goes on."""

from protos import errors
from protos.v1 import worker_pb2
from router.attempt import Attempt


class SplitAttempt(Attempt):
    """A prefill and a decode worker."""

    def start(self, deadline: float) -> None:
        """Ask decode for room and prefill for the first token, both at once. Raises `WorkerLost`."""
        pair, job = self._pair, self._pair.job
        description = pair.prefill.description
        self._listen(pair.decode, 0, job.likely_pages)
        self._listen(pair.prefill, pair.compute_tokens, job.prompt_pages, pair.keys)
        assert description is not None  # listening says that it is live
        decode = worker_pb2.Decode(source=description.source)
        self._fill(decode, deadline)
        pair.decode.send(worker_pb2.RouterMessage(decode=decode))
        pair.prefill.send(worker_pb2.RouterMessage(prefill=self._prefill(deadline)))
        self._sent_ms = self._elapsed_ms()

    def lost(self, pool: str, error: errors.DiptychError) -> None:
        """A worker's stream broke. Once the first token is there, decode says whether it can do without prefill."""
        if pool == "prefill" and self._first_token_seen:
            self._holding.discard(pool)
        else:
            super().lost(pool, error)

    def _on_update(self, pool: str, update: worker_pb2.SequenceUpdate) -> None:
        if pool == "prefill":
            self._on_prefill(update)
        else:
            self._on_decode(update)

    def _on_prefill(self, update: worker_pb2.SequenceUpdate) -> None:
        if update.sealed:
            pages = worker_pb2.Pages(request_id=self._wire_id, pages=update.sealed)
            self._pair.decode.send(worker_pb2.RouterMessage(pages=pages))
        is_first = bool(update.token_ids) and not self._first_token_seen
        self._on_prompt(update)
        if not is_first:
            return
        self.stage = "hand_over"
        token = update.token_ids[0]
        if not self._deliver(self._answer.push([token]), update.logprobs):
            start = worker_pb2.Start(request_id=self._wire_id, first_token=token)
            self._pair.decode.send(worker_pb2.RouterMessage(start=start))

    def _on_decode(self, update: worker_pb2.SequenceUpdate) -> None:
        if update.HasField("hand_over"):
            self._on_hand_over(update.hand_over)
        self._on_tokens("decode", update)

    def _on_hand_over(self, report: worker_pb2.HandOverReport) -> None:
        self.stage = "decode"
        if "prefill" in self._holding:
            self._leave("prefill")
        self._stats.decode_joined_ms = self._elapsed_ms()
        self._stats.hand_over_ms = report.pull_ms
        self._stats.pages_handed_over = report.pages
        self._stats.bytes_handed_over = report.bytes
        self._stats.decode_prefix_pages = report.prefix_pages
        self._stats.transport = report.transport
        self._stats.decode_worker = self._pair.decode.record.worker_id

    def _leave(self, pool: str) -> None:
        """Before its first token prefill must stop; after it, it holds only a pin."""
        if pool == "decode" or not self._first_token_seen:
            super()._leave(pool)
            return
        self._holding.discard(pool)
        release = worker_pb2.Release(request_id=self._wire_id)
        self._pair.prefill.send(worker_pb2.RouterMessage(release=release))
        self._pair.prefill.forget(self._wire_id)
