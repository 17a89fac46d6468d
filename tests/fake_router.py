"""`diptych.v1.Inference` as a test wants it answered."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from protos import errors
from protos.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from rpc import status
from rpc.server import RpcServer, start_server

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


def scored(token: int) -> common_pb2.TokenLogprobs:
    """The likelier of two."""
    return common_pb2.TokenLogprobs(token_id=token, logprob=-0.5, top_ids=[token, 9], top_logprobs=[-0.5, -1.5])


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Answers "one two" in two messages. `error` comes instead, after the first message where `late`.

    Log-probabilities come with it where they are asked for.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.deadlines: list[float | None] = []
        self.authorizations: list[str | bytes | None] = []
        self.error: errors.DiptychError | None = None
        self.late = False
        self.hang = False
        self.called = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def serve(self) -> RpcServer:
        """Listen on any free port."""

        def register(server: Any) -> None:
            inference_pb2_grpc.add_InferenceServicer_to_server(self, server)

        return await start_server(register, [SERVICE], "127.0.0.1", 0)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        self.authorizations.append(dict(context.invocation_metadata()).get("authorization"))
        self.called.set()
        if self.error and not self.late:
            await status.abort(context, self.error)
        first = inference_pb2.GenerateResponse(request_id="r", token_ids=[1, 2], text="one")
        if request.sampling.HasField("logprobs"):
            first.logprobs.extend(map(scored, (1, 2)))
        if request.sampling.HasField("prompt_logprobs"):
            first.prompt_logprobs.extend(map(scored, (7, 8)))
        yield first
        if self.hang:
            try:
                await asyncio.sleep(3600)
            finally:
                self.cancelled.set()
        if self.error:
            await status.abort(context, self.error)
        yield inference_pb2.GenerateResponse(
            request_id="r",
            token_ids=[3],
            logprobs=[scored(3)] if request.sampling.HasField("logprobs") else [],
            text=" two",
            finish_reason=common_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=5, completion_tokens=3),
            stats=inference_pb2.RequestStats(pages_handed_over=4),
        )

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        self.requests.append(request)
        if self.error:
            await status.abort(context, self.error)
        return inference_pb2.TokenizeResponse(token_ids=[7, 8])

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        if self.error:
            await status.abort(context, self.error)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="m", context_length=9, vocab_size=3)])
