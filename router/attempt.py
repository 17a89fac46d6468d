"""One try at a request: what is said to its workers, and what their answers set going."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic

from kvstore.keys import PageKey, pack_keys
from protos import errors
from protos.v1 import common_pb2, inference_pb2, worker_pb2
from router.admission import Admitted
from router.answer import Answer, Piece
from router.placer import Pair
from router.streams import TokenStream
from router.worker_link import Claim, Name, WorkerLink
from rpc import status

log = logging.getLogger(__name__)


class Attempt(ABC):
    """Listens to its workers under a wire id of its own, so nothing that is said to another attempt is taken for this.

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
        self._pair = pair
        self._links: dict[str, WorkerLink] = {link.record.pool: link for link in (pair.prefill, pair.decode)}
        self._answer = answer
        self._stream = stream
        self._stats = stats
        self._received_at = received_at
        self._sent_ms = 0.0
        self._holding: set[str] = set()  # pools whose worker holds something for us
        self._first_token_seen = False
        # Kept until the first token: another attempt, which can only come before it, finds them anew.
        self._prompt_logprobs: list[common_pb2.TokenLogprobs] = []

    @abstractmethod
    def start(self, deadline: float) -> None:
        """Say to the workers what is wanted. Raises `WorkerLost`."""

    def end(self) -> None:
        """Free what the workers hold, and stop listening. Only the first call does anything."""
        for pool in list(self._holding):
            self._leave(pool)
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
            else:
                self._on_update(pool, update)
        except Exception:  # one request's fault must not end the stream that all share
            log.exception("request %s failed in the router", self._request.request_id)
            self._fail(errors.DiptychError("the router failed; its log says why", stage=self.stage))

    def lost(self, pool: str, error: errors.DiptychError) -> None:
        """A worker's stream broke."""
        self._holding.discard(pool)
        self.blamed = self._links[pool].name
        self._fail(error)

    @abstractmethod
    def _on_update(self, pool: str, update: worker_pb2.SequenceUpdate) -> None:
        """A worker's word that is no error."""

    def _on_error(self, pool: str, error: errors.DiptychError) -> None:
        self._holding.discard(pool)
        if isinstance(error, errors.WorkerLost):  # decode can lose only the worker that it pulls from
            self.blamed = self._pair.prefill.name
        elif isinstance(error, errors.Overloaded):
            self.blamed = self._links[pool].name
        self._fail(error)

    def _on_prompt(self, update: worker_pb2.SequenceUpdate) -> None:
        """Note what is said of the prompt, and when its computing brings the first token."""
        if update.HasField("prefill"):
            self._stats.queue_ms = self._sent_ms + update.prefill.queue_ms
            self._stats.prefill_ms = update.prefill.compute_ms
            self._stats.prefill_prefix_pages = update.prefill.prefix_pages
            self._stats.prefill_fetched_pages = update.prefill.fetched_pages
            self._stats.fetch_ms = update.prefill.fetch_ms
        self._prompt_logprobs += update.prompt_logprobs
        if update.token_ids and not self._first_token_seen:
            self._first_token_seen = True
            self._stats.first_token_ms = self._elapsed_ms()
            self._stream.push_prompt(self._prompt_logprobs)

    def _on_tokens(self, pool: str, update: worker_pb2.SequenceUpdate) -> None:
        """Take tokens, and the answer's end, from the worker that goes on."""
        if update.finish_reason:
            self._holding.discard(pool)
        ended = self._deliver(self._answer.push(list(update.token_ids)), update.logprobs)
        if update.finish_reason and not ended:
            self._deliver(self._answer.close(update.finish_reason))

    def _deliver(self, piece: Piece, logprobs: Sequence[common_pb2.TokenLogprobs] = ()) -> bool:
        """Hand a piece to the client, with those of the log-probabilities that are its own; whether it was the last."""
        self._stream.push(piece.token_ids, piece.text, logprobs[: len(piece.token_ids)])
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
        message.root_key = self._pair.root
        message.page_keys = pack_keys(self._pair.keys)
        message.max_pages = self._request.tenant.max_pages or 0
        message.sampling.CopyFrom(self._request.sampling.to_proto())
        message.end_token_ids.extend(sorted(self._request.end_ids))
        message.deadline_s = deadline - monotonic()

    def _prefill(self, deadline: float) -> worker_pb2.Prefill:
        message = worker_pb2.Prefill(fetch=self._pair.fetch)
        self._fill(message, deadline)
        return message

    def _listen(self, link: WorkerLink, tokens: int, pages: int, keys: Sequence[PageKey] = ()) -> None:
        try:
            link.listen(self._wire_id, Claim(self, tokens, pages, keys))
        except errors.WorkerLost:
            self.blamed = link.name
            raise
        self._holding.add(link.record.pool)

    def _leave(self, pool: str) -> None:
        """The worker must stop, and free what it holds."""
        self._holding.discard(pool)
        cancel = worker_pb2.Cancel(request_id=self._wire_id)
        self._links[pool].send(worker_pb2.RouterMessage(cancel=cancel))

    def _elapsed_ms(self) -> float:
        return 1e3 * (monotonic() - self._received_at)
