"""Decode attention's schedule and plain kernels. Run by test_kernels_interpreter.py, with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.cascade_attention import cascade_attention_torch, cascade_attention_triton
from kernels.decode_attention import decode_attention_torch, decode_attention_triton
from kernels.decode_split import decode_split
from kernels.hopper_decode_merge import merge_parts
from kernels.hopper_decode_schedule import SPLIT, DecodeSchedule
from kernels.merge_attention import merge_attention_torch, merge_attention_triton
from kernels.triton_kernel import next_power_of_2
from kernels_oracle import make_case, with_shared_prefix

OPTIONS = pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 20, "soft_cap": 3.0}, {"window": 500}, {"soft_cap": 0.5}], ids=str
)


@OPTIONS
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_attention(queries, options):
    case = make_case([3, 16, 17, 63, 100], [queries] * 5, heads=6, kv_heads=2)
    lse, expected_lse = torch.full((2, *case.q.shape[:2]), torch.nan)
    plan = case.plan(queries)
    out = decode_attention_triton(case.q, case.cache, 1, plan, lse, **options)
    expected = decode_attention_torch(case.q, case.cache, 1, plan, expected_lse, **options)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse, expected_lse, atol=3e-6, rtol=3e-6)


def test_more_rows_than_a_tile_holds():
    case = make_case([40, 30], [8, 8], heads=20, kv_heads=2, head_dim=32)
    out = decode_attention_triton(case.q, case.cache, 1, case.plan(8))
    torch.testing.assert_close(out.double(), case.expected(1)[0], atol=3e-6, rtol=3e-6)


def test_batch_invariant_results_are_bitwise_the_same():
    case = make_case([700, 40, 1500], [1, 1, 1], heads=2, kv_heads=1, head_dim=16)
    out = decode_attention_triton(case.q, case.cache, 1, case.plan(batch_invariant=True))
    torch.testing.assert_close(out.double(), case.expected(1)[0], atol=3e-6, rtol=3e-6)
    for index in range(3):
        alone = case.alone(index)
        assert torch.equal(
            decode_attention_triton(alone.q, alone.cache, 1, alone.plan(batch_invariant=True))[0], out[index]
        )


def test_sequences_without_a_context():
    case = make_case([40, 3], [1, 1], heads=2, kv_heads=1)
    lens = torch.tensor([40, 0], dtype=torch.int32)
    out, lse = torch.full(case.q.shape, torch.nan), torch.full(case.q.shape[:2], torch.nan)
    decode_split(case.q, case.cache, 1, case.page_table, lens, out, lse, longest=100)
    torch.testing.assert_close(out[0].double(), case.expected(1)[0][0], atol=3e-6, rtol=3e-6)
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()


@pytest.mark.parametrize(("prefix", "queries", "soft_cap"), [(0, 1, 0.0), (48, 1, 0.0), (96, 3, 2.0)])
def test_cascade_attention(prefix, queries, soft_cap):
    case = with_shared_prefix(make_case([99, 100, 130, 177], [queries] * 4, heads=6, kv_heads=2), prefix)
    lse, expected_lse = torch.full((2, *case.q.shape[:2]), torch.nan)
    plan = case.plan(queries)
    out = cascade_attention_triton(case.q, case.cache, 1, plan, prefix, lse, soft_cap=soft_cap)
    expected = cascade_attention_torch(case.q, case.cache, 1, plan, prefix, expected_lse, soft_cap=soft_cap)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse, expected_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge_attention(dtype):
    parts, lses = torch.randn(2, 7, 3, 24), torch.randn(2, 7, 3) * 5
    lses[0, :3], lses[1, 2:5] = -torch.inf, -torch.inf
    parts[lses.isneginf()] = torch.nan
    lse, expected_lse = torch.empty(2, 7, 3)
    out = merge_attention_triton(parts[0], lses[0], parts[1], lses[1], dtype, lse)
    expected = merge_attention_torch(parts[0], lses[0], parts[1], lses[1], dtype, expected_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def units_done(schedule: DecodeSchedule) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(sequence, KV head) -> the runs [first unit, end) of it that the programs are given, as the kernel walks them."""
    kv_heads = schedule.shape[2]
    skip = int(schedule.skip) if schedule.skip is not None else 0
    spans = [span(n, skip, schedule) for n in schedule.context_lens.tolist()]
    done: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for seq, head, unit, todo, units, length, _, base, *_ in (
        schedule.plan[8:].view(-1, 8).tolist()[: schedule.programs]
    ):
        if todo:
            assert (base, units) == spans[seq]
            assert length == schedule.context_lens[seq]
        while todo:
            units = spans[seq][1]
            take = min(todo, units - unit)
            if schedule.parts:
                take = min(units - unit, max(SPLIT, -(-units // schedule.parts)))
            done.setdefault((seq, head), []).append((spans[seq][0] + unit, spans[seq][0] + unit + take))
            todo, unit = todo - take, unit + take
            if unit == units and todo:
                unit, head = 0, head + 1
                if head == kv_heads:
                    head, seq = 0, seq + 1
                    while not spans[seq][1]:
                        seq += 1
    return done


def span(length: int, skip: int, schedule: DecodeSchedule) -> tuple[int, int]:
    """(first unit, units) of a sequence, by the plain words of the schedule's docstring."""
    oldest = max(0, length - schedule.queries - schedule.window + 1) if schedule.window else 0
    keys = range(max(oldest, skip), length)
    return (keys[0] // 64, -(-length // 64) - keys[0] // 64) if keys else (skip // 64, 0)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 100, "queries": 3}, {"skip": 70}])
@pytest.mark.parametrize(
    "lens",
    [[1], [8449], [70000], [5, 0, 0, 64, 65, 0, 700], [0, 0], [200] * 40 + [0, 6400, 71, 70, 69] + [0]],
    ids=lambda lens: f"{len(lens)}x{max(lens)}",
)
def test_every_unit_is_done_once(lens, options, batch_invariant):
    options = dict(options)
    if "skip" in options:
        options["skip"] = torch.tensor([options["skip"]], dtype=torch.int32)
    schedule = DecodeSchedule(
        torch.tensor(lens, dtype=torch.int32), 8, 2, 64, batch_invariant=batch_invariant, **options
    )
    schedule.refresh()
    done = units_done(schedule)
    spans = [span(n, int(options.get("skip", 0)), schedule) for n in lens]
    assert set(done) == {(seq, head) for seq, (_, units) in enumerate(spans) if units for head in range(2)}
    for (seq, _), runs in done.items():
        first, units = spans[seq]
        assert [unit for run in runs for unit in range(*run)] == list(range(first, first + units))
        if batch_invariant:
            assert len(runs) <= schedule.parts


@pytest.mark.parametrize(("queries", "causal", "with_rest"), [(1, True, False), (3, True, False), (5, False, True)])
def test_parts_are_merged(queries, causal, with_rest):
    heads, kv_heads, d, lens = 6, 2, 32, [0, 3 * 64 * SPLIT + 1, 5] if causal else [9 * 64 * SPLIT + 100] * 3
    schedule = DecodeSchedule(
        torch.tensor(lens, dtype=torch.int32),
        heads,
        kv_heads,
        d,
        queries=queries,
        causal=causal,
        batch_invariant=causal,
    )
    tokens = 3 * queries - (0 if causal else 2)  # without causality the last tile may be part-filled
    parts = [-(-units // max(SPLIT, -(-units // schedule.parts))) for units in (-(-n // 64) for n in lens)]
    rows = next_power_of_2(queries * 3)
    stat = schedule.stat.view(3, kv_heads, schedule.parts, 2, rows).fill_(torch.nan)
    part = schedule.part.view(3, kv_heads, schedule.parts, rows, d).fill_(torch.nan)
    rest, rest_lse = torch.randn(tokens, heads, d), torch.randn(tokens, heads) * 3
    rest_lse[0] = -torch.inf
    rest[0] = torch.nan
    out, lse = torch.full((tokens, heads, d), torch.nan), torch.full((tokens, heads), torch.nan)
    for seq, count in enumerate(parts):
        stat[seq, :, :count, 0] = torch.randn(kv_heads, count, rows) * 20
        stat[seq, :, :count, 1] = torch.rand(kv_heads, count, rows) + 0.5
        part[seq, :, :count] = torch.randn(kv_heads, count, rows, d)
    merge_parts(schedule, out, lse, *((rest, rest_lse) if with_rest else ()))
    for token in range(tokens):
        seq, query = divmod(token, queries)
        for head in range(heads):
            mine = (seq, head // 3, slice(parts[seq]))
            row = query * 3 + head % 3
            weight = (stat[mine][:, 0, row].double() * d**-0.5).exp()
            total, acc = (stat[mine][:, 1, row] * weight).sum(), (part[mine][:, row] * weight[:, None]).sum(0)
            if with_rest and rest_lse[token, head] > -torch.inf:
                total = total + rest_lse[token, head].double().exp()
                acc = acc + rest[token, head] * rest_lse[token, head].double().exp()
            expected = acc / total if total > 0 else torch.zeros(d)
            torch.testing.assert_close(out[token, head], expected.float(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[token, head], total.log().float(), atol=1e-5, rtol=1e-5)


def test_a_batch_invariant_schedule_cuts_a_sequence_alike_in_any_batch():
    def runs(lens: list[int], seq: int) -> list[tuple[int, int]]:
        schedule = DecodeSchedule(torch.tensor(lens, dtype=torch.int32), 8, 2, 64, batch_invariant=True)
        schedule.refresh()
        return units_done(schedule)[seq, 1]

    alone = runs([5000], 0)
    assert len(alone) > 1
    assert runs([1, 0, 5000, 300], 2) == runs([5000] * 9, 8) == alone
