"""Placement with real links: what is asked counts at once, the directory may fail, the choice is logged."""

import asyncio
import logging
import re
from collections import Counter
from dataclasses import replace

import pytest
import pytest_asyncio

from engine.sampling_params import SamplingParams
from fake_worker import FORMAT, never
from kvstore.directory import WorkerRecord
from kvstore.keys import pack_tokens, page_keys
from kvstore.memory_directory import MemoryDirectory
from protos import errors
from router.admission import Admitted
from router.placer import Placer
from router.served_model import ServedModel
from router.tenant import Tenant
from router.worker_link import Claim
from router_rig import Rig, until
from tiny_model import make_tiny_model

PROMPT = list(range(3, 103))  # six full pages and a part of a seventh


class Directory(MemoryDirectory):
    """One whose lookups can hang or fail."""

    lookups = 0
    trouble = ""

    async def lookup(self, keys):
        self.lookups += 1
        if self.trouble == "hangs":
            await asyncio.sleep(60)
        if self.trouble == "fails":
            raise errors.MetadataUnavailable("it sleeps")
        return await super().lookup(keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_positions=16384)


@pytest_asyncio.fixture
async def rig(model):
    """Two workers in each pool, all connected."""
    async with Rig(model, 2, 2, directory=Directory()) as rig:
        await until(lambda: all(len(rig.router.fleet.usable(pool)) == 2 for pool in ("prefill", "decode")))
        yield rig


@pytest.fixture
def placer(rig, model):
    return Placer(rig.router.fleet, ServedModel.load("tiny", model), wait_s=0.2)


def admitted(prompt=PROMPT, max_tokens=20, secret="secret") -> Admitted:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Admitted("mine", pack_tokens(prompt), len(prompt), sampling, frozenset(), Tenant(secret))


async def place(placer, request=None, excluded=frozenset(), deadline_s=10.0):
    now = asyncio.get_running_loop().time()
    return await placer.place(request or admitted(), excluded, now + deadline_s)


class Nobody:
    def update(self, pool, update): ...

    def lost(self, pool, error): ...


def publish(rig, model, holder: str, pages: int):
    """Say that the holder has the first pages of `PROMPT`; returns all of its keys."""
    root = ServedModel.load("tiny", model).root_key("secret", ("weights", FORMAT))
    keys = page_keys(root, PROMPT, 16)
    rig.directory.publish(holder, keys[0], keys[:pages])
    return keys


async def test_the_holder_of_the_prefix_is_chosen_in_both_pools(rig, placer, model):
    for worker in (rig.prefills[1], rig.decodes[1]):
        keys = publish(rig, model, worker.record.holder, 4)
    pair = await place(placer)
    assert (pair.prefill.record.worker_id, pair.decode.record.worker_id) == ("prefill-1", "decode-1")
    assert pair.keys == keys
    assert pair.compute_tokens == 100 - 4 * 16


async def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_in_full(rig, placer, model):
    for worker in (rig.prefills[1], rig.decodes[1]):
        publish(rig, model, worker.record.holder, 4)
    pair = await place(placer, replace(admitted(), sampling=SamplingParams(prompt_logprobs=0)))
    assert pair.compute_tokens == 100
    assert pair.decode.record.worker_id == "decode-1"  # what it holds need not be sent


async def store(rig) -> WorkerRecord:
    """A page store that routers know."""
    changes = {"worker_id": "store-0", "incarnation": 77, "pool": "store", "address": "127.0.0.1:1"}
    record = replace(rig.prefill.record, endpoints=(("tcp", "t"),), **changes)
    rig.directory.renew(record, 3600.0)
    await until(lambda: record.holder in rig.router.fleet.holders())
    return record


async def set_rate(rig, tokens_per_s: float) -> None:
    """Let all prefill workers say that they compute so fast."""
    for worker in rig.prefills:
        worker.load.tokens_per_s = tokens_per_s
        await worker.say("nobody")
    links = rig.router.fleet.usable("prefill")
    await until(lambda: {link.step_load.load.tokens_per_s for link in links} == {tokens_per_s})


async def test_pages_are_fetched_where_that_is_faster_than_computing_them(rig, placer, model, caplog):
    caplog.set_level(logging.INFO, "router.placer")
    record = await store(rig)
    publish(rig, model, record.holder, 5)
    assert (await place(placer)).fetch is None  # 100 tokens at 10,000/s take less than a fetch
    await set_rate(rig, 200.0)
    pair = await place(placer)
    assert (pair.fetch.pages, pair.fetch.address, pair.compute_tokens) == (5, "127.0.0.1:1", 100 - 5 * 16)
    source = pair.fetch.source
    assert (source.worker_id, source.incarnation, source.format) == ("store-0", 77, FORMAT.to_proto())
    assert [(e.transport, e.address) for e in source.endpoints] == [("tcp", "t")]
    assert caplog.records[-1].getMessage().endswith("they hold 0 and 0, store-0 5)")
    for worker in rig.prefills:
        worker.announce(pull_rates={"tcp": 1.0})
    links = rig.router.fleet.usable("prefill")
    await until(lambda: all(link.record.pull_rates for link in links))
    assert (await place(placer)).fetch is None  # at a byte a second


async def test_nothing_is_fetched_that_cannot_be_used_or_had(rig, placer, model):
    await set_rate(rig, 200.0)
    record = await store(rig)
    publish(rig, model, record.holder, 5)
    scored = replace(admitted(), sampling=SamplingParams(prompt_logprobs=0))
    assert (await place(placer, scored)).fetch is None
    name = record.worker_id, record.incarnation
    assert (await place(placer, excluded={name})).fetch is None
    rig.directory.deregister(*name)
    await until(lambda: record.holder not in rig.router.fleet.holders())
    assert (await place(placer)).fetch is None


async def test_prompts_that_arrive_together_go_where_their_common_pages_are_computed(rig, placer):
    await set_rate(rig, 1000.0)
    first = await place(placer)
    [other] = [link for link in rig.router.fleet.usable("prefill") if link is not first.prefill]
    first.prefill.listen("1", Claim(Nobody(), 100, 7, first.keys))
    other.listen("2", Claim(Nobody(), 50, 4))
    similar = admitted([*PROMPT[:90], *range(9)])  # five pages and a part of the sixth are the same
    near, elsewhere = await place(placer, similar), await place(placer, admitted(PROMPT[::-1]))
    scored = await place(placer, replace(similar, sampling=SamplingParams(prompt_logprobs=0)))
    other.forget("2")
    idle = await place(placer, similar)  # to wait 100 ms for pages that take 80 would be slower
    first.prefill.forget("1")
    over = await place(placer, similar)
    assert (near.prefill is first.prefill, near.compute_tokens) == (True, 99 - 5 * 16)
    for pair in (elsewhere, scored, idle):
        assert pair.prefill is other
    assert over.compute_tokens == 99


async def test_keys_depend_on_the_tenants_secret(placer):
    one, other = await place(placer), await place(placer, admitted(secret="another"))
    assert one.root != other.root
    assert not set(one.keys) & set(other.keys)


async def test_requests_at_once_spread_over_equal_workers(placer):
    asked: Counter[str] = Counter()
    for index in range(8):
        pair = await place(placer)
        pair.prefill.listen(str(index), Claim(Nobody(), pair.compute_tokens, 7))
        pair.decode.listen(str(index), Claim(Nobody(), 0, 8))
        asked.update((pair.prefill.record.worker_id, pair.decode.record.worker_id))
    assert asked == dict.fromkeys(("prefill-0", "prefill-1", "decode-0", "decode-1"), 4)
    for link in placer._fleet.links.values():
        link.claims.clear()


async def test_one_line_tells_the_choice_with_its_numbers_and_no_token(placer, caplog):
    caplog.set_level(logging.INFO, "router.placer")
    await place(placer)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("request mine: prefill on prefill-0, decode on decode-0: ")
    total, *terms = map(float, re.findall(r"(\d+\.\d)", line))
    assert len(terms) == 5
    assert total == pytest.approx(sum(terms), abs=0.3)
    assert "[" not in line


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
async def test_a_lookup_that_fails_is_a_miss(rig, placer, trouble):
    rig.directory.trouble = trouble
    assert (await place(placer)).compute_tokens == 100


async def test_a_directory_that_is_known_to_be_down_is_not_asked(rig, placer):
    rig.router.fleet.directory_up = False
    assert (await place(placer)).compute_tokens == 100
    assert rig.directory.lookups == 0


async def test_a_prompt_without_a_full_page_needs_no_lookup(rig, placer):
    await place(placer, admitted([5, 6, 7]))
    assert rig.directory.lookups == 0


async def test_excluded_workers_are_not_chosen(rig, placer):
    excluded = {(w.record.worker_id, w.record.incarnation) for w in (rig.prefills[0], rig.decodes[0])}
    pair = await place(placer, excluded=excluded)
    assert (pair.prefill.record.worker_id, pair.decode.record.worker_id) == ("prefill-1", "decode-1")
    assert placer.has_others(excluded)
    everyone = excluded | {(rig.prefills[1].record.worker_id, rig.prefills[1].record.incarnation)}
    assert not placer.has_others(everyone)
    with pytest.raises(errors.NoWorkers, match="prefill"):
        await place(placer, excluded=everyone)


async def test_waiting_leaves_time_of_the_deadline(rig, model):
    patient = Placer(rig.router.fleet, ServedModel.load("tiny", model), wait_s=60.0)
    everyone = {(w.record.worker_id, w.record.incarnation) for w in rig.decodes}
    with pytest.raises(errors.NoWorkers, match="decode"):
        async with asyncio.timeout(5):
            await place(patient, excluded=everyone, deadline_s=0.4)


async def test_a_request_that_no_worker_can_hold_is_refused(placer):
    with pytest.raises(errors.InvalidRequest) as caught:
        await place(placer, admitted(max_tokens=15_950))
    assert caught.value.field == "max_tokens"


async def test_limits_are_those_of_the_largest_workers(rig, placer):
    assert placer.limits().prefill == 16_000
    rig.prefills[0].announce(max_tokens=17_000)
    rig.decodes[0].announce(max_tokens=10)
    await until(lambda: placer.limits().prefill == 17_000)
    assert placer.limits().decode == 16_000


async def test_the_predicted_first_token_is_that_of_the_shortest_queue(rig, placer):
    assert placer.ttft_s() == 0.0
    for worker, queued in zip(rig.prefills, (50_000, 20_000), strict=True):
        worker.load.queued_tokens = queued
        await worker.say("nobody")
    await until(lambda: placer.ttft_s() > 1.0)
    assert placer.ttft_s() <= 2.0  # 20,000 tokens at 10,000/s


async def test_the_directorys_load_counts_where_no_step_has_come(rig, placer):
    await asyncio.sleep(1.6)  # the loads that came with hello are old now
    rig.prefills[0].announce(load={"queued_tokens": 90_000, "tokens_per_s": 1000.0})
    rig.prefills[1].announce(load={"queued_tokens": 0, "tokens_per_s": 1000.0})
    links = rig.router.fleet.usable("prefill")
    await until(lambda: {link.record.load.get("queued_tokens") for link in links} == {0, 90_000})
    assert (await place(placer)).prefill.record.worker_id == "prefill-1"


async def test_no_worker_is_asked_before_its_stream_is_up(model):
    async with Rig(model, 1, 1) as rig:
        rig.prefill.script = never
        placer = Placer(rig.router.fleet, ServedModel.load("tiny", model), wait_s=0.2)
        await place(placer)
        await rig.decode.die()
        await until(lambda: not rig.router.fleet.usable("decode"))
        with pytest.raises(errors.NoWorkers, match=r"1 known, 0 connected"):
            await place(placer)
