"""Who may call, and whose pages a request's are."""

import logging

import pytest
import pytest_asyncio

from diptych.client import Client
from protos import errors
from protos.v1 import inference_pb2
from router.served_model import ServedModel
from router.tenant import Tenant
from router.tenants import Tenants
from router_rig import Rig, fails
from tiny_model import make_tiny_model

ALONE = Tenant("")
ONE = Tenant("secret of one", "one", "key-of-one-123456", max_pages=40)
OTHER = Tenant("secret of other", "other", "key-of-other-123456")
PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def rig(model):
    async with Rig(model, settings={"tenants": (ONE, OTHER)}) as rig:
        yield rig


def test_a_key_names_its_tenant():
    tenants = Tenants([ONE, OTHER], ALONE)
    assert tenants.identify([("user-agent", "x"), ("authorization", "Bearer key-of-one-123456")]) is ONE
    assert tenants.identify([("authorization", "bearer  key-of-other-123456 ")]) is OTHER


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [],
        [("authorization", "")],
        [("authorization", "Bearer ")],
        [("authorization", "key-of-one-123456")],
        [("authorization", "Basic key-of-one-123456")],
        [("authorization", "Bearer key-of-one-12345")],
        [("authorization", "Bearer key-of-one-1234567")],
        [("authorization-bin", b"Bearer key-of-one-123456")],
    ],
)
def test_whoever_has_no_key_is_refused(metadata):
    with pytest.raises(errors.Unauthenticated, match="authorization: Bearer"):
        Tenants([ONE, OTHER], ALONE).identify(metadata)


def test_where_no_tenants_are_named_everyone_is_the_one():
    assert Tenants([], ALONE).identify(None) is ALONE
    assert Tenants([], ALONE).identify([("authorization", "Bearer anything")]) is ALONE


def test_secrets_are_not_shown():
    assert "secret" not in repr(ONE).replace("secret=", "")
    assert "key-of" not in repr(ONE)


async def test_no_call_is_answered_without_a_key(rig):
    await fails(rig.generate(PROMPT), errors.Unauthenticated)
    assert not rig.prefill.said("prefill")
    async with Client(rig.router.address, api_key="key-of-nobody-1234") as client:
        for call in (client.complete(token_ids=PROMPT), client.tokenize("hi"), client.list_models()):
            with pytest.raises(errors.Unauthenticated):
                await call
    async with Client(rig.router.address) as client:
        with pytest.raises(errors.Unauthenticated):
            await client.list_models()


async def test_workers_are_told_the_tenants_root_and_share(rig, model, caplog):
    caplog.set_level(logging.DEBUG)
    for tenant in (ONE, OTHER):
        async with Client(rig.router.address, api_key=tenant.api_key) as client:
            assert await client.tokenize("hi")
            assert await client.list_models()
            await client.complete(token_ids=PROMPT, max_tokens=4, ignore_eos=True)
    identity = rig.router.fleet.identity()
    roots = [ServedModel.load("tiny", model).root_key(tenant.secret, identity) for tenant in (ONE, OTHER)]
    for worker, kind in ((rig.prefill, "prefill"), (rig.decode, "decode")):
        told = worker.said(kind)
        assert [(message.root_key, message.max_pages) for message in told] == [(roots[0], 40), (roots[1], 0)]
        assert told[0].page_keys[:16] != told[1].page_keys[:16]
    for secret in (ONE.secret, ONE.api_key, OTHER.secret, OTHER.api_key):
        assert secret not in caplog.text


async def test_a_refused_call_takes_no_place(model):
    async with Rig(model, settings={"tenants": (ONE,), "max_inflight": 1}) as rig:
        request = inference_pb2.GenerateRequest()
        running = rig.stub.Generate(rig_request(request), metadata=[("authorization", f"Bearer {ONE.api_key}")])
        await running.read()
        await fails(rig.generate(PROMPT), errors.Unauthenticated)  # and not Overloaded
        running.cancel()


def rig_request(request):
    request.tokens.ids.extend(PROMPT)
    request.sampling.max_tokens = 400
    request.sampling.ignore_eos = True
    return request
