"""A started server answers health and reflection, refuses what does not parse, and names a taken port."""

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos import errors
from protos.v1 import inference_pb2, inference_pb2_grpc
from rpc import status
from rpc.server import start_server

NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Echo(inference_pb2_grpc.InferenceServicer):
    async def Tokenize(self, request, context):
        return inference_pb2.TokenizeResponse(token_ids=[len(request.text)])

    async def Generate(self, request, context):
        for _ in range(2):
            yield inference_pb2.GenerateResponse(text=request.text)


@pytest_asyncio.fixture
async def server():
    server = await start_server(
        lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(Echo(), server), [NAME], "127.0.0.1", 0
    )
    yield server
    await server.stop(grace_s=0)


async def call_raw(address: str, method: str, data: bytes, streams: bool) -> list[bytes]:
    async with grpc.aio.insecure_channel(address) as channel:
        if streams:
            return [answer async for answer in channel.unary_stream(f"/{NAME}/{method}")(data, timeout=5)]
        return [await channel.unary_unary(f"/{NAME}/{method}")(data, timeout=5)]


@pytest.mark.parametrize(("method", "streams"), [("Tokenize", False), ("Generate", True)])
async def test_bytes_that_do_not_parse_are_an_invalid_request(server, method, streams):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_raw(server.address, method, b"\x12\x02\xff\xfe", streams)  # a string that is no UTF-8
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == "message"


async def test_good_messages_pass(server):
    request = inference_pb2.TokenizeRequest(text="four").SerializeToString()
    answer = await call_raw(server.address, "Tokenize", request, streams=False)
    assert inference_pb2.TokenizeResponse.FromString(answer[0]).token_ids == [4]
    request = inference_pb2.GenerateRequest(text="x").SerializeToString()
    assert len(await call_raw(server.address, "Generate", request, streams=True)) == 2


async def test_health_says_serving(server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(server):
    import asyncio

    def services() -> list[str]:
        with grpc.insecure_channel(server.address) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert NAME in await asyncio.to_thread(services)


async def test_a_taken_port_is_a_typed_error_that_names_it(server):
    port = int(server.address.rsplit(":", 1)[1])
    with pytest.raises(errors.PortTaken, match=str(port)):
        await start_server(lambda server: None, [], "127.0.0.1", port)
