"""Tenants with a share of the pool in one engine: none takes more, none waits for another's, all get to their end."""

import random

import pytest

from decode_worker.role import DecodeRole
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine_rig import Hopes
from kvstore.keys import PageKey, page_keys
from prefill_worker.role import PrefillRole
from protos.errors import InvalidRequest
from role_kit import PAGE, ScriptedPuller, assert_empty, cancel, make_engine, request, updates

ONE, OTHER = (PageKey(bytes([n]) * 16) for n in (1, 2))


def sequence(engine: Engine, name: str, tenant: PageKey, limit: int, tokens, answer_len=1) -> Sequence:
    tokens = list(tokens)
    return Sequence(
        request_id=name,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens) + answer_len,
        sampling=SamplingParams(),
        end_ids=frozenset(),
        keys=page_keys(tenant, tokens, PAGE),
        root=tenant,
        quota=engine.scheduler.pool.quota(tenant, limit) if limit else None,
    )


def admitted(engine: Engine) -> list[str]:
    engine.scheduler.seat()
    return [sequence.request_id for sequence in engine.scheduler.running]


def run(engine: Engine) -> dict[str, list[int]]:
    """Step to the end; each sequence's answer. No tenant may have more than its share after any step."""
    answers: dict[str, list[int]] = {}
    quotas = {s.quota for s in engine.scheduler.waiting if s.quota}
    for _ in range(2000):
        if not engine.scheduler.has_work:
            return answers
        for progress in engine.step():
            one = progress.sequence
            if progress.token is not None:
                answers.setdefault(one.request_id, []).append(progress.token)
            if progress.finish is not None:
                engine.scheduler.drop(one)
        assert all(quota.available >= 0 and quota.pages <= quota.limit for quota in quotas)
    raise AssertionError(f"they do not end: {engine.scheduler.running} {engine.scheduler.waiting}")


def test_who_waits_for_its_share_holds_up_only_its_own():
    engine, _ = make_engine(16)
    for name, tenant, limit, tokens in [
        ("a", ONE, 4, range(12)),  # 3 pages
        ("b", ONE, 4, range(20, 29)),  # 3 more
        ("c", ONE, 4, range(30, 32)),  # would fit, but comes after b
        ("d", OTHER, 0, range(9)),
    ]:
        engine.scheduler.add(sequence(engine, name, tenant, limit, tokens))
    assert admitted(engine) == ["a", "d"]
    engine.scheduler.drop(engine.scheduler.running[0])
    assert admitted(engine) == ["d", "b", "c"]


def test_a_prompt_that_no_share_could_hold_is_refused():
    engine, _ = make_engine(16)
    engine.scheduler.add(sequence(engine, "a", ONE, 4, range(16), answer_len=1))
    with pytest.raises(InvalidRequest, match="need 5 pages, and the tenant may have 4"):
        engine.scheduler.add(sequence(engine, "b", ONE, 4, range(16), answer_len=2))
    engine.scheduler.add(sequence(engine, "c", OTHER, 0, range(16), answer_len=2))


def test_answers_that_grow_past_their_share_cost_only_their_own_tenant():
    engine, _ = make_engine(16, lengths=Hopes(), max_sequences=8)
    work = [("a", ONE, 6), ("b", ONE, 6), ("c", OTHER, 8), ("d", OTHER, 8)]
    sequences = [sequence(engine, name, who, limit, [ord(name)] * 7, answer_len=10) for name, who, limit in work]
    for one in sequences:
        engine.scheduler.add(one)
    answers = run(engine)
    assert answers == {name: list(range(1007, 1017)) for name, _, _ in work}
    assert engine.scheduler.preemptions == 1  # a and b need 8 pages in the end; c and d have them


@pytest.mark.parametrize("seed", range(12))
def test_everybody_gets_to_the_end_and_nobody_takes_more_than_its_share(seed):
    draw = random.Random(seed)
    engine, _ = make_engine(draw.randrange(8, 16), lengths=Hopes(draw.randrange(1, 5)), max_sequences=6, max_waiting=99)
    tenants = [(ONE, draw.randrange(3, 8)), (OTHER, draw.randrange(3, 8)), (PageKey(bytes(16)), 0)]
    expected = {}
    for index in range(24):
        tenant, limit = draw.choice(tenants)
        most = (limit or engine.scheduler.pool.total_pages) * PAGE + 1
        length = draw.randrange(1, min(most, 20))
        answer_len = draw.randrange(1, most - length + 1)
        tokens = [draw.randrange(3)] * length  # some have a prefix in common
        engine.scheduler.add(sequence(engine, str(index), tenant, limit, tokens, answer_len))
        expected[str(index)] = list(range(1000 + length, 1000 + length + answer_len))
    assert run(engine) == expected
    assert engine.scheduler.pool.held_pages == 0
    assert engine.scheduler.pool.available_pages == engine.scheduler.pool.total_pages


def test_a_decode_worker_passes_a_tenant_by_that_has_its_share():
    role = DecodeRole(make_engine(16)[0], ScriptedPuller())
    share = {"root_key": ONE, "max_pages": 5}
    role.handle("r", request("decode", "a", range(12), max_tokens=4, **share))
    role.handle("r", request("decode", "b", range(12), max_tokens=4, **share))
    role.handle("r", request("decode", "c", range(12), max_tokens=4, root_key=OTHER))
    role.handle("r", request("decode", "d", range(20, 23), max_tokens=1, **share))  # would fit, but comes after b
    assert [name for name, arrival in role._requests.items() if arrival.admitted] == ["a", "c"]
    role.handle("r", cancel("a"))
    assert role._requests["b"].admitted
    for name in ("b", "c", "d"):
        role.handle("r", cancel(name))
    assert_empty(role)


def test_a_worker_refuses_what_has_no_root_key():
    role = PrefillRole(make_engine(16)[0], ScriptedPuller())
    role.handle("r", request("prefill", "a", range(12), root_key=b"short"))
    (update,) = updates(role)
    assert (update.error.code, update.error.field) == ("invalid_request", "root_key")
