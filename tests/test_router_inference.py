"""The calls that clients make: many at once, slow ones, malformed ones, ones without a deadline."""

import asyncio
import random
from time import monotonic
from types import SimpleNamespace

import grpc.aio
import pytest
import pytest_asyncio

from fake_worker import echo
from protos import errors
from protos.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from router.inference import Call, Inference
from router.streams import TokenStream
from router.tenant import Tenant
from router_rig import Rig, fails, read, until, with_prompt
from rpc import status
from tiny_model import make_tiny_model

PROMPT = list(range(3, 43))
# So that a client's buffers hold little of what it does not read.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]


def long_request(max_tokens: int) -> inference_pb2.GenerateRequest:
    """Its id makes every message large."""
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = inference_pb2.GenerateRequest(request_id="x" * 128, sampling=sampling)
    return with_prompt(request, PROMPT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_positions=16384)


@pytest_asyncio.fixture
async def rig(model):
    async with Rig(model) as rig:
        yield rig


async def test_64_requests_at_once_each_get_their_own_answer(model):
    rng = random.Random(5)
    async with Rig(model, 2, 2) as rig:
        for worker in (*rig.prefills, *rig.decodes):
            worker.pause_s = 0.002
        jobs = [
            ([rng.randrange(3, 250) for _ in range(rng.randrange(1, 200))], rng.randrange(1, 60)) for _ in range(64)
        ]
        answers = await asyncio.gather(*(rig.complete(prompt, max_tokens=count) for prompt, count in jobs))
        for (prompt, count), whole in zip(jobs, answers, strict=True):
            assert whole.token_ids == echo(prompt)[:count]
            assert whole.text == rig.tokenizer.decode(whole.token_ids)
        for worker in (*rig.prefills, *rig.decodes):
            share = len(worker.said("prefill") or worker.said("decode"))
            assert 16 <= share <= 48, "equal workers should have about equal shares"


async def test_a_slow_client_is_sent_several_tokens_in_one_message_and_loses_none(rig):
    async with grpc.aio.insecure_channel(rig.router.address, options=SMALL_WINDOW) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(long_request(4000), timeout=30)
        await rig.decode.hears("start")
        await until(lambda: not rig.decode.held, 20)  # the whole answer has been written
        whole = await read(call)
    assert whole.token_ids == echo(PROMPT)[:4000]
    assert whole.text == rig.tokenizer.decode(whole.token_ids)
    assert whole.messages < 3500


async def test_a_client_that_reads_nothing_is_cut_off_at_its_deadline(model):
    async with (
        Rig(model, settings={"default_deadline_s": 1.5}) as rig,
        grpc.aio.insecure_channel(rig.router.address, options=SMALL_WINDOW) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(long_request(4000))
        await rig.decode.hears("start")
        await until(lambda: not rig.router.inference.lives, 10)
        assert (await fails(call, errors.DeadlineExceeded)).stage == "stream"


async def test_bytes_that_are_no_utf8_are_a_typed_error(rig):
    call = rig.channel.unary_stream(
        "/diptych.v1.Inference/Generate",
        request_serializer=bytes,
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )
    error = await fails(call(b"\x12\x02\xff\xfe", timeout=10), errors.InvalidRequest)  # field 2: text
    assert error.field == "message"


async def test_characters_are_never_split(rig):
    text = "für 你好 🙂🙃 end"
    ids = rig.tokenizer.encode(text)
    rig.prefill.answer = rig.decode.answer = lambda prompt: ids
    rig.decode.pause_s = 0.005
    call = rig.generate(max_tokens=len(ids))
    pieces = [message.text async for message in call]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 3


async def test_refusals_carry_the_request_id(rig):
    error = await fails(rig.generate(request_id="mine", temperature=-1.0), errors.InvalidRequest)
    assert (error.field, error.request_id, error.stage) == ("temperature", "mine", "admission")


async def test_a_huge_request_id_is_a_typed_error(rig):
    error = await fails(rig.generate(request_id="x" * 1_000_000), errors.InvalidRequest)
    assert error.field == "request_id"


async def test_a_request_id_comes_back_with_every_message(rig):
    async for message in rig.generate(request_id="mine"):
        assert message.request_id == "mine"


async def test_an_id_that_is_in_flight_is_refused_and_free_afterwards(rig):
    rig.decode.pause_s = 0.02
    first = asyncio.create_task(rig.complete(request_id="twin", max_tokens=30))
    await rig.prefill.hears("prefill")
    error = await fails(rig.generate(request_id="twin"), errors.InvalidRequest)
    assert error.field == "request_id"
    assert (await first).token_ids == (await rig.complete(request_id="twin", max_tokens=30)).token_ids


async def test_more_than_max_inflight_are_told_when_to_come_back(model):
    async with Rig(model, settings={"max_inflight": 2}) as rig:
        rig.decode.pause_s = 0.02
        running = [asyncio.create_task(rig.complete(max_tokens=50)) for _ in range(2)]
        await rig.decode.hears("start", 2)
        error = await fails(rig.generate(), errors.Overloaded)
        assert error.retry_after_s > 0
        assert "first token" in error.message
        for answer in await asyncio.gather(*running):
            assert len(answer.token_ids) == 50
        await rig.complete()


async def test_tokenize_gives_the_ids_that_generate_uses(rig):
    for prompt in ("hello there", [("system", "be brief"), ("user", "hi")]):
        answer = await rig.stub.Tokenize(with_prompt(inference_pb2.TokenizeRequest(model="tiny"), prompt))
        await rig.complete(prompt)
        sent = rig.prefill.said("prefill")[-1].token_ids
        assert b"".join(token.to_bytes(4, "little") for token in answer.token_ids) == sent


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (inference_pb2.TokenizeRequest(text="hi", model="gpt-9"), errors.UnknownModel, None),
        (inference_pb2.TokenizeRequest(), errors.InvalidRequest, "prompt"),
        (inference_pb2.TokenizeRequest(text=""), errors.InvalidRequest, "text"),
    ],
    ids=["model", "nothing", "empty"],
)
async def test_tokenize_refuses_what_generate_refuses(rig, request_, kind, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.Tokenize(request_)
    error = status.from_rpc_error(caught.value)
    assert type(error) is kind
    assert getattr(error, "field", None) == field


async def test_models_are_listed_with_their_sizes(rig):
    (listed,) = (await rig.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (listed.id, listed.context_length) == ("tiny", 16384)
    assert listed.vocab_size == rig.tokenizer.vocab_size


async def test_a_default_max_tokens_shrinks_to_what_fits(rig):
    request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(ignore_eos=True))
    whole = await read(rig.stub.Generate(with_prompt(request, [5] * 15990), timeout=20))
    assert len(whole.token_ids) == 10  # the workers hold 16000


async def test_a_request_that_comes_too_late_is_not_begun(rig):
    stream = TokenStream("late")
    now = monotonic()
    call = Call(long_request(5), None, stream, now, now - 0.001, None)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await rig.router.inference._answer(call, Tenant("secret"))
    assert caught.value.stage == "admission"
    assert not rig.prefill.said("prefill")


def test_the_routers_deadline_is_a_little_before_the_calls():
    inference = Inference(None, None, None, None, None, default_deadline_s=600.0)

    def left(call_has):
        return inference._time_left_s(SimpleNamespace(time_remaining=lambda: call_has))

    assert left(None) == 600.0
    assert left(10.0) == pytest.approx(9.95)
    assert left(0.1) == pytest.approx(0.09)
    assert left(0.0) == 0.0
