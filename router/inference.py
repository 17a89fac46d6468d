"""The calls that clients make."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import uuid4

import grpc.aio

from protos import errors
from protos.v1 import inference_pb2, inference_pb2_grpc
from router.admission import MAX_REQUEST_ID, Admission
from router.placer import Placer
from router.prompt import PromptReader
from router.request import Request
from router.served_model import ServedModel
from router.streams import Summary, TokenStream
from router.tenant import Tenant
from router.tenants import Tenants
from rpc import status

log = logging.getLogger(__name__)

# The router's deadline is this much before the call's, so that its answer, which names the stage, still arrives.
MARGIN_S = 0.05
MARGIN_SHARE = 0.1
# How long a client may take over the end of its answer once the request's time is up.
LAST_WORDS_S = 0.5


@dataclass(frozen=True)
class Call:
    """One `Generate` call. Times are monotonic seconds; `handler` is the task that sends to the client."""

    request: inference_pb2.GenerateRequest
    context: Any
    stream: TokenStream
    received_at: float
    deadline: float
    handler: asyncio.Task[Any] | None


class Inference(inference_pb2_grpc.InferenceServicer):
    """Each `Generate` call has a second task that lives its request. It ends with the call, and `stop` awaits it."""

    def __init__(
        self,
        model: ServedModel,
        tenants: Tenants,
        admission: Admission,
        prompts: PromptReader,
        placer: Placer,
        default_deadline_s: float,
    ) -> None:
        self._model = model
        self._tenants = tenants
        self.admission = admission
        self._prompts = prompts
        self._placer = placer
        self._default_deadline_s = default_deadline_s
        self.lives: dict[asyncio.Task[None], TokenStream] = {}
        self._stopping = False

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams the answer. A client that goes away takes its request with it."""
        stream = TokenStream(request.request_id or uuid4().hex)
        now = monotonic()
        call = Call(request, context, stream, now, now + self._time_left_s(context), asyncio.current_task())
        life = asyncio.create_task(self._live(call), name=f"request {stream.request_id}")
        self.lives[life] = stream
        life.add_done_callback(self.lives.pop)
        # Not in `finally`: a generator that is cut off while it sends is closed only by the garbage collector.
        context.add_done_callback(lambda _: life.cancel())
        try:
            async for message in stream.messages():
                yield message
        except errors.DiptychError as error:
            error.request_id = stream.request_id[:MAX_REQUEST_ID]
            await status.abort(context, error)
        finally:
            stream.close()

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        """The ids that `Generate` would make of the same prompt."""
        try:
            self._tenants.identify(context.invocation_metadata())
            with self.admission.slot(uuid4().hex):
                self.admission.check_model(request.model)
                ids = await self._prompts.read(request)
        except errors.DiptychError as error:
            await status.abort(context, error)
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """The one model that is served."""
        try:
            self._tenants.identify(context.invocation_metadata())
        except errors.DiptychError as error:
            await status.abort(context, error)
        config = self._model.config
        model = inference_pb2.Model(
            id=self._model.model_id, context_length=config.max_positions, vocab_size=config.vocab
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def stop(self) -> None:
        """End every request with a typed error, and take no more."""
        self._stopping = True
        lives = dict(self.lives)
        for life, stream in lives.items():
            stream.fail(_stopping())
            life.cancel()
        if lives:
            await asyncio.wait(lives)

    async def _live(self, call: Call) -> None:
        """A request from admission until its client has the last word; it counts as in flight all the while."""
        stream = call.stream
        with ExitStack() as held:
            try:
                tenant = self._tenants.identify(call.context.invocation_metadata())
                held.enter_context(self.admission.slot(stream.request_id))
                stream.finish(await self._answer(call, tenant))
            except errors.DiptychError as error:
                stream.fail(error)
            except Exception:
                log.exception("request %s failed in the router", stream.request_id)
                stream.fail(errors.DiptychError("the router failed; its log says why"))
            await self._see_off(call)

    async def _answer(self, call: Call, tenant: Tenant) -> Summary:
        running: Request | None = None
        if self._stopping:
            raise _stopping()
        left = call.deadline - monotonic()
        if left <= 0:
            raise errors.DeadlineExceeded("the request's time was up when it came", stage="admission")
        try:
            async with asyncio.timeout(left):
                admitted = await self.admission.admit(call.request, call.stream.request_id, tenant)
                running = Request(admitted, self._model, self._placer, call.stream, call.received_at, call.deadline)
                return await running.run()
        except TimeoutError as error:
            stage = running.stage if running else "admission"
            took = monotonic() - call.received_at
            raise errors.DeadlineExceeded(
                f"the request's time was up after {took:.2f} s, in {stage}", stage=stage
            ) from error

    async def _see_off(self, call: Call) -> None:
        """Wait for the client to take the end; where it does not until the deadline, the call is cut."""
        left = max(0.0, call.deadline - monotonic()) + LAST_WORDS_S
        try:
            async with asyncio.timeout(left):
                await call.stream.closed()
        except TimeoutError:
            log.info("request %s: the client does not read, its call is cut", call.stream.request_id)
            late = errors.DeadlineExceeded(
                "the answer was not read in time", request_id=call.stream.request_id, stage="stream"
            )
            # The handler waits for the client to read, so the end is put into the transport's queue from here; that
            # it cannot leave there either is known.
            with suppress(grpc.aio.AbortError, TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await status.abort(call.context, late)
            if call.handler is not None:
                call.handler.cancel()

    def _time_left_s(self, context: Any) -> float:
        left: float | None = context.time_remaining()
        if left is None:
            return self._default_deadline_s
        return left - min(MARGIN_S, MARGIN_SHARE * left)


def _stopping() -> errors.WorkerLost:
    return errors.WorkerLost("the router is shutting down: ask another", stage="router")
