"""One request's life after admission: placed, run, and placed again while nothing has been said to the client."""

import logging
from itertools import count
from secrets import token_hex

from protos import errors
from protos.v1 import inference_pb2
from router.admission import Admitted
from router.answer import Answer
from router.attempt import Attempt
from router.colocated_attempt import ColocatedAttempt
from router.placer import Pair, Placer
from router.served_model import ServedModel
from router.split_attempt import SplitAttempt
from router.streams import Summary, TokenStream
from router.worker_link import Name

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# Every attempt of every request has a wire id of its own, unlike those of other routers and of this one's past lives.
_LIFE = token_hex(4)
_attempts = count(1)


class Request:
    """Runs one admitted request. `stage` says where it is. Times are monotonic seconds."""

    def __init__(
        self,
        admitted: Admitted,
        model: ServedModel,
        placer: Placer,
        stream: TokenStream,
        received_at: float,
        deadline: float,
    ) -> None:
        self._admitted = admitted
        self._placer = placer
        self._stream = stream
        self._received_at = received_at
        self._deadline = deadline
        self._answer = Answer(model.tokenizer, admitted.sampling, admitted.end_ids)
        self._stats = inference_pb2.RequestStats()
        self._attempt: Attempt | None = None

    @property
    def stage(self) -> str:
        return self._attempt.stage if self._attempt else "placement"

    async def run(self) -> Summary:
        """See the request through. Raises the error that ends it.

        A failure that may not happen again elsewhere costs the client a pause, as long as it has no token. Later
        ones are final: another worker's first token could differ from the one that the client has.
        """
        avoid: set[Name] = set()
        while True:
            pair = await self._placer.place(self._admitted, avoid, self._deadline)
            self._stats.prefill_attempts += 1
            self._attempt = attempt = self._new_attempt(pair)
            try:
                attempt.start(self._deadline)
                reason = await attempt.done
                return Summary(reason, self._usage(), self._stats)
            except errors.TryAgain as error:
                if self._answer.tokens or self._stats.prefill_attempts == MAX_ATTEMPTS:
                    raise
                if attempt.blamed:
                    avoid.add(attempt.blamed)
                if isinstance(error, errors.Overloaded) and not self._placer.has_others(avoid):
                    raise
                log.warning("request %s is placed again: %s", self._admitted.request_id, error)
                self._attempt = None
            finally:
                attempt.end()

    def _new_attempt(self, pair: Pair) -> Attempt:
        stats = self._stats
        stats.prefill_worker = pair.prefill.record.worker_id
        stats.prompt_pages = len(pair.keys)
        kind = ColocatedAttempt if pair.is_colocated else SplitAttempt
        return kind(
            wire_id=f"{self._admitted.request_id}#{_LIFE}.{next(_attempts)}",
            request=self._admitted,
            pair=pair,
            answer=self._answer,
            stream=self._stream,
            stats=stats,
            received_at=self._received_at,
        )

    def _usage(self) -> inference_pb2.Usage:
        return inference_pb2.Usage(prompt_tokens=self._admitted.prompt_tokens, completion_tokens=self._answer.tokens)
