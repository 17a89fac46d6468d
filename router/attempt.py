"""One try at a request on one pair of workers: what is said to both, and what their answers set going."""

import asyncio
import logging
from time import monotonic

from kvstore.keys import pack_keys
from protos import errors
from protos.v1 import common_pb2, inference_pb2, worker_pb2
from router.admission import Admitted
from router.answer import Answer, Piece
from router.placer import Pair
from router.streams import TokenStream
from router.worker_link import Claim, Name
from rpc import status

log = logging.getLogger(__name__)


class Attempt:
    """Listens to both workers under a wire id of its own, so nothing that is said to another attempt is taken for this.

    `done` becomes the reason why the answer ended, or the error that ended the attempt; `blamed` is then the worker
    that another attempt should avoid. `end` must be called whatever happens: it frees what the workers still hold.
    """

    def __init__(
        self,
        wire_id: str,
        request: Admitted,
        pair: Pair,
        answer: Answer,
        stream: TokenStream,
        stats: inference_pb2.RequestStats,
        received_at: float,
    ) -> None:
        self.stage = "prefill"
        self.blamed: Name | None = None
        self.done: asyncio.Future[common_pb2.FinishReason] = asyncio.get_running_loop().create_future()
        self._wire_id = wire_id
        self._request = request
        self._links = {"prefill": pair.prefill, "decode": pair.decode}
        self._pair = pair
        self._answer = answer
        self._stream = stream
        self._stats = stats
        self._received_at = received_at
        self._sent_ms = 0.0
        self._holding: set[str] = set()  # pools whose worker holds something for us
        self._first_token_seen = False

    def start(self, deadline: float) -> None:
        """Ask decode for room and prefill for the first token, both at once. Raises `WorkerLost`."""
        pair, job = self._pair, self._pair.job
        description = pair.prefill.description
        self._listen("decode", Claim(self, 0, job.total_pages))
        self._listen("prefill", Claim(self, pair.compute_tokens, job.prompt_pages))
        assert description is not None  # listening says that it is live
        decode = worker_pb2.Decode(source=description.source)
        prefill = worker_pb2.Prefill()
        self._fill(decode, deadline)
        self._fill(prefill, deadline)
        pair.decode.send(worker_pb2.RouterMessage(decode=decode))
        pair.prefill.send(worker_pb2.RouterMessage(prefill=prefill))
        self._sent_ms = self._elapsed_ms()

    def end(self) -> None:
        """Free what the workers hold, and stop listening. Only the first call does anything."""
        if "prefill" in self._holding:
            self._leave_prefill()
        if "decode" in self._holding:
            self._cancel("decode")
        for link in self._links.values():
            link.forget(self._wire_id)
        if self.done.done():
            self.done.exception()  # seen, also where nobody waits for it any more
        else:
            self.done.cancel()

    def update(self, pool: str, update: worker_pb2.SequenceUpdate) -> None:
        """A worker's word on this attempt."""
        if self.done.done():
            return
        try:
            if update.HasField("error"):
                self._on_error(pool, status.from_detail(update.error))
            elif pool == "prefill":
                self._on_prefill(update)
            else:
                self._on_decode(update)
        except Exception:  # one request's fault must not end the stream that all share
            log.exception("request %s failed in the router", self._request.request_id)
            self._fail(errors.DiptychError("the router failed; its log says why", stage=self.stage))

    def lost(self, pool: str, error: errors.DiptychError) -> None:
        """A worker's stream broke. Once the first token is there, decode says whether it can do without prefill."""
        self._holding.discard(pool)
        if not (pool == "prefill" and self._first_token_seen):
            self.blamed = self._links[pool].name
            self._fail(error)

    def _on_error(self, pool: str, error: errors.DiptychError) -> None:
        self._holding.discard(pool)
        if isinstance(error, errors.WorkerLost):  # decode can lose only the worker that it pulls from
            self.blamed = self._pair.prefill.name
        elif isinstance(error, errors.Overloaded):
            self.blamed = self._links[pool].name
        self._fail(error)

    def _on_prefill(self, update: worker_pb2.SequenceUpdate) -> None:
        if update.sealed:
            pages = worker_pb2.Pages(request_id=self._wire_id, pages=update.sealed)
            self._pair.decode.send(worker_pb2.RouterMessage(pages=pages))
        if update.HasField("prefill"):
            self._stats.queue_ms = self._sent_ms + update.prefill.queue_ms
            self._stats.prefill_ms = update.prefill.compute_ms
            self._stats.prefill_prefix_pages = update.prefill.prefix_pages
        if update.token_ids and not self._first_token_seen:
            self._on_first_token(update.token_ids[0])

    def _on_first_token(self, token: int) -> None:
        self._first_token_seen = True
        self.stage = "hand_over"
        self._stats.first_token_ms = self._elapsed_ms()
        if not self._deliver(self._answer.push([token])):
            start = worker_pb2.Start(request_id=self._wire_id, first_token=token)
            self._pair.decode.send(worker_pb2.RouterMessage(start=start))

    def _on_decode(self, update: worker_pb2.SequenceUpdate) -> None:
        if update.HasField("hand_over"):
            self._on_hand_over(update.hand_over)
        if update.finish_reason:
            self._holding.discard("decode")
        ended = self._deliver(self._answer.push(list(update.token_ids)))
        if update.finish_reason and not ended:
            self._deliver(self._answer.close(update.finish_reason))

    def _on_hand_over(self, report: worker_pb2.HandOverReport) -> None:
        self.stage = "decode"
        if "prefill" in self._holding:
            self._leave_prefill()
        self._stats.decode_joined_ms = self._elapsed_ms()
        self._stats.hand_over_ms = report.pull_ms
        self._stats.pages_handed_over = report.pages
        self._stats.bytes_handed_over = report.bytes
        self._stats.decode_prefix_pages = report.prefix_pages
        self._stats.transport = report.transport
        self._stats.decode_worker = self._pair.decode.record.worker_id

    def _deliver(self, piece: Piece) -> bool:
        """Hand a piece to the client; whether it was the last."""
        self._stream.push(piece.token_ids, piece.text)
        if piece.finish is not None:
            self.done.set_result(piece.finish)
        return piece.finish is not None

    def _fail(self, error: errors.DiptychError) -> None:
        if not self.done.done():
            error.request_id = self._request.request_id
            self.done.set_exception(error)

    def _fill(self, message: worker_pb2.Prefill | worker_pb2.Decode, deadline: float) -> None:
        message.request_id = self._wire_id
        message.token_ids = self._request.token_ids
        message.page_keys = pack_keys(self._pair.keys)
        message.sampling.CopyFrom(self._request.sampling.to_proto())
        message.end_token_ids.extend(sorted(self._request.end_ids))
        message.deadline_s = deadline - monotonic()

    def _listen(self, pool: str, claim: Claim) -> None:
        try:
            self._links[pool].listen(self._wire_id, claim)
        except errors.WorkerLost:
            self.blamed = self._links[pool].name
            raise
        self._holding.add(pool)

    def _leave_prefill(self) -> None:
        """Before its first token prefill must stop; after it, it holds only a pin."""
        if not self._first_token_seen:
            self._cancel("prefill")
            return
        self._holding.discard("prefill")
        release = worker_pb2.Release(request_id=self._wire_id)
        self._pair.prefill.send(worker_pb2.RouterMessage(release=release))
        self._pair.prefill.forget(self._wire_id)

    def _cancel(self, pool: str) -> None:
        self._holding.discard(pool)
        cancel = worker_pb2.Cancel(request_id=self._wire_id)
        self._links[pool].send(worker_pb2.RouterMessage(cancel=cancel))

    def _elapsed_ms(self) -> float:
        return 1e3 * (monotonic() - self._received_at)
