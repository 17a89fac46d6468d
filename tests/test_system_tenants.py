"""Two tenants of one cluster, as processes: no page is shared, shares are kept, and nothing of a prompt is written."""

import asyncio
import re
import threading

import msgpack
import pytest
import pytest_asyncio
import redis

from diptych.client import Client
from engine.config import EngineConfig
from kvstore.keys import pack_tokens
from protos import errors
from stack import Stack
from tiny_model import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [201, 17, 88, 140, 33, 250, 9, 71] * 12 + [5, 6, 7]  # six pages and a bit
ANSWER = {"max_tokens": 24, "ignore_eos": True}  # so that sampled tokens fill a page as well
KEYS = {"one": "key-of-one-1234567", "two": "key-of-two-1234567"}
TENANTS = [
    {"name": "one", "secret": "secret of one 12", "api_key": KEYS["one"]},
    {"name": "two", "secret": "secret of two 12", "api_key": KEYS["two"], "max_pages": 10},
]


class Watch:
    """Everything that Redis is told, as bytes."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._monitor = self._client.monitor()
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Watch":
        self._monitor.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with redis.Redis.from_url(str(self._url()), socket_timeout=5) as client:
            client.echo("the end")
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._monitor.__exit__(*exc)
        self._client.close()

    def _url(self) -> str:
        return "unix://" + self._client.connection_pool.connection_kwargs["path"]

    def _read(self) -> None:
        while not self._lines or '"the end"' not in self._lines[-1]:
            self._lines.append(self._monitor.connection.read_response().decode("latin-1"))

    def written(self) -> bytes:
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', "\n".join(self._lines))
        return b"\n".join(text.encode("latin-1").decode("unicode_escape").encode("latin-1") for text in strings)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "all"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory, log):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    engine = EngineConfig(page_size=16, num_pages=64, max_sequences=8, dtype="float32")
    with log.open("wb") as file:
        async with Stack(model, 1, 1, engine, router_settings={"tenants": TENANTS}, log=file) as stack:
            yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def clients(stack):
    at = stack.router.address
    async with Client(at, api_key=KEYS["one"]) as one, Client(at, api_key=KEYS["two"]) as two:
        yield one, two
    await stack.assert_nothing_held()


async def test_tenants_share_nothing_and_nothing_of_a_prompt_leaves_the_processes(stack, clients, log):
    one, two = clients
    with Watch(stack.valkey.url) as watch:
        first = await one.complete(token_ids=PROMPT, **ANSWER)
        again = await one.complete(token_ids=PROMPT, **ANSWER)
        others = await two.complete(token_ids=PROMPT, **ANSWER)
        await asyncio.sleep(0.2)  # what was sealed last is announced
    assert first.token_ids == again.token_ids == others.token_ids
    assert (first.stats.prefill_prefix_pages, again.stats.prefill_prefix_pages) == (0, 6)
    assert (others.stats.prefill_prefix_pages, others.stats.decode_prefix_pages) == (0, 0)

    written, logged = watch.written(), log.read_bytes()
    assert b"prefill-" in written  # the worker's record, packed: what is written is seen here
    assert b"of its 7 pages they hold" in logged
    for tokens in (PROMPT, list(first.token_ids)):
        for start in range(len(tokens) - 6):
            some = tokens[start : start + 6]
            for form in (pack_tokens(some), msgpack.packb(some)[1:], ", ".join(map(str, some)).encode()):
                assert form not in written + logged
    for secret in (value for tenant in TENANTS for value in (tenant["secret"], tenant["api_key"])):
        assert secret.encode() not in written + logged


async def test_a_tenants_share_bounds_what_its_requests_hold(stack, clients):
    one, two = clients
    beside = asyncio.create_task(one.complete(token_ids=PROMPT, max_tokens=300, ignore_eos=True))
    crowd = [asyncio.create_task(two.complete(token_ids=[n, *PROMPT], **ANSWER)) for n in range(3, 9)]  # 8 pages each
    most = 0
    while not all(task.done() for task in crowd):
        for description in await stack.descriptions():
            own = 25 if description.pool == "decode" else 7  # of the first tenant's request
            most = max(most, description.load.held_pages - own)
    assert most <= 10
    assert len({answer.stats.prompt_pages for answer in [await task for task in crowd]}) == 1
    assert len((await beside).token_ids) == 300


async def test_what_no_share_could_hold_is_refused_by_name(clients):
    with pytest.raises(errors.InvalidRequest, match="the tenant may have 10"):
        await clients[1].complete(token_ids=PROMPT * 2, **ANSWER)
    with pytest.raises(errors.InvalidRequest, match="the tenant may have 10"):
        await clients[1].complete(token_ids=PROMPT, max_tokens=100, ignore_eos=True)
