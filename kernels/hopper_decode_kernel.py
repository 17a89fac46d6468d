# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""The device side of `hopper_decode`: paged flash decoding (Dao et al. 2023) in Gluon, shared out as stream-K.

Work is cut into units of 64 tokens of one KV head. `hopper_decode_schedule` gives each program a run of units, from
lengths that live on the device, so one CUDA graph serves changing lengths. In a program one warp does nothing but
fetch: it keeps K and V of two or three units in flight by TMA, across heads and sequences; the other four compute.
A head whose units were cut is merged by whichever program finishes it last.

A tile's 64 rows are the query heads of one KV head, for each of a sequence's queries: query by query.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper_decode_results import keep_part, merge_cut_tile, token_and_head, write_empty, write_result
from kernels.hopper_decode_schedule import part_size, span
from kernels.hopper_dependent_launch import after_previous_kernel, let_next_kernel_start

# All threads of the warps that reach it; Triton 3.7 has it under a new name.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _page_ids(row, unit, last, PAGE: gl.constexpr):
    """Ids of the pages under one unit of a page table's row: four at page size 16, else the same one four times."""
    if PAGE == 16:
        i = unit * 4
        a = gl.load(row + i)
        b = gl.load(row + gl.minimum(i + 1, last))
        c = gl.load(row + gl.minimum(i + 2, last))
        d = gl.load(row + gl.minimum(i + 3, last))
        return a, b, c, d
    else:  # noqa: RET505 (a compile-time branch)
        a = gl.load(row + unit // (PAGE // 64))
        return a, a, a, a


@gluon.jit
def _fetch_box(kv_desc, row, to_v, bar, k_t, v_t, box, HD: gl.constexpr, BOXES: gl.constexpr):
    """One box of K and of V, in columns of 64: the swizzle's width."""
    for col in gl.static_range(HD // 64):
        tma.async_copy_global_to_shared(kv_desc, [row, col * 64], bar, k_t.index(box + col * BOXES))
    for col in gl.static_range(HD // 64):
        tma.async_copy_global_to_shared(kv_desc, [row + to_v, col * 64], bar, v_t.index(box + col * BOXES))


@gluon.jit
def _next_sequence(Lens, b, skip, QUERIES: gl.constexpr, WINDOW: gl.constexpr, SKIPS: gl.constexpr):
    """The next one that has units: its number, length, first unit, units."""
    b += 1
    length = gl.load(Lens + b)
    base, n = span(length, skip, QUERIES, WINDOW, SKIPS)
    while n == 0:
        b += 1
        length = gl.load(Lens + b)
        base, n = span(length, skip, QUERIES, WINDOW, SKIPS)
    return b, length, base, n


@gluon.jit
def _producer(
    kv_desc, k_t, v_t, full, empty, Table, Lens, Skip, Plan, table_stride, first_row, page_rows,
    KV_HEADS: gl.constexpr, HD: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, ST: gl.constexpr,
    QUERIES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SKIPS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = 64 // BOX
    NEWEST: gl.constexpr = 1 if QUERIES == 1 else 2  # units at a context's end that its queries' own tokens lie in
    to_v = KV_HEADS * PAGE
    record = Plan + 8 + gl.program_id(0) * 8
    todo = gl.load(record + 3)
    b = gl.load(record)
    h = gl.load(record + 1)
    unit = gl.load(record + 2)
    n = gl.load(record + 4)
    length = gl.load(record + 5)
    base = gl.load(record + 7)
    skip = gl.load(Skip) if SKIPS else 0
    it = gl.to_tensor(0)
    while todo > 0:
        take = gl.minimum(todo, n - unit)
        unit += base
        end = base + n
        row = Table + b.to(gl.int64) * table_stride
        last = (length - 1) // PAGE
        p0, p1, p2, p3 = _page_ids(row, unit, last, PAGE)
        for i in range(take):
            if OVERLAP == 1 and CAUSAL:  # noqa: SIM102 (a compile-time branch)
                if unit + i >= end - NEWEST:  # the previous kernel may be writing the newest tokens
                    after_previous_kernel()
            st = it % ST
            inside = first_row + h * PAGE + (unit + i) % (PAGE // BOX) * BOX
            if PAGE == 16:
                inside = first_row + h * PAGE
            mbarrier.wait(empty.index(st), ((it // ST) & 1) ^ 1)
            mbarrier.expect(full.index(st), 2 * 64 * HD * 2)
            box = st * (HD // 64) * BOXES
            _fetch_box(kv_desc, p0 * page_rows + inside, to_v, full.index(st), k_t, v_t, box, HD, BOXES)
            if BOXES == 4:
                _fetch_box(kv_desc, p1 * page_rows + inside, to_v, full.index(st), k_t, v_t, box + 1, HD, BOXES)
                _fetch_box(kv_desc, p2 * page_rows + inside, to_v, full.index(st), k_t, v_t, box + 2, HD, BOXES)
                _fetch_box(kv_desc, p3 * page_rows + inside, to_v, full.index(st), k_t, v_t, box + 3, HD, BOXES)
            it += 1
            p0, p1, p2, p3 = _page_ids(row, gl.minimum(unit + i + 1, end - 1), last, PAGE)
        todo -= take
        unit = 0
        h += 1
        if (h == KV_HEADS) & (todo > 0):
            h = 0
            b, length, base, n = _next_sequence(Lens, b, skip, QUERIES, WINDOW, SKIPS)


@gluon.jit
def _clear_tail(v, tokens, HD: gl.constexpr):
    """Zero the rows of a V unit past a sequence's end: 0 * NaN of a page's earlier life would be NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HD, HD // 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, L)), 1)
    x = v.load(L)
    v.store(gl.where(rows < tokens, x, gl.full([64, HD], 0.0, x.dtype, layout=L)))
    fence_async_shared()


@gluon.jit
def _consumer(
    Q, k_s, v_s, full, empty, Out, Lse, Lens, Skip, Plan, Part, Stat, Count, scale, squeeze, q_stride, tokens, seqs,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr, ST: gl.constexpr,
    QUERIES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SKIPS: gl.constexpr, PARTS: gl.constexpr,
    SPLIT: gl.constexpr, CAPPED: gl.constexpr, WITH_LSE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    Q_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_L, k_width=2)
    DTYPE: gl.constexpr = Q.dtype.element_ty
    HEADS: gl.constexpr = KV_HEADS * GROUP
    USED: gl.constexpr = GROUP * QUERIES  # rows
    c = gl.program_id(0)
    record = Plan + 8 + c * 8
    todo = gl.load(record + 3)
    units = gl.load(Plan)
    used = gl.load(Plan + 1)
    b = gl.load(record)
    h = gl.load(record + 1)
    unit = gl.load(record + 2)
    n = gl.load(record + 4)
    length = gl.load(record + 5)
    first = gl.load(record + 6)  # number of the head's first unit; mine: of this program's
    base = gl.load(record + 7)
    skip = gl.load(Skip) if SKIPS else 0
    mine = c * units // used
    if OVERLAP == 1:
        after_previous_kernel()
    if PARTS == 0:
        write_empty(Out, Lse, Lens, skip, seqs, QUERIES * HEADS, HD, WITH_LSE)
    it = gl.to_tensor(0)
    qr = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, Q_L)), 1)
    qd = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, Q_L)), 0)
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, S_L))
    behind = gl.maximum(QUERIES - 1 - gl.arange(0, 64, layout=gl.SliceLayout(1, S_L)) // GROUP, 0)  # newer queries
    while todo > 0:
        take = gl.minimum(todo, n - unit)
        size = part_size(n, PARTS, SPLIT) if PARTS > 0 else 0
        if PARTS > 0:
            take = gl.minimum(n - unit, size)
        token, head = token_and_head(b, h, qr, GROUP, QUERIES)
        if not CAUSAL:  # the last tile may have fewer queries
            token = gl.minimum(token, tokens - 1)
        q = gl.load(Q + token.to(gl.int64) * q_stride + head * HD + qd, mask=qr < USED, other=0.0)
        acc = gl.zeros([64, HD], gl.float32, layout=O_L)
        m = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S_L))
        total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_L))
        for i in range(take):
            st = it % ST
            mbarrier.wait(full.index(st), (it // ST) & 1)
            left = length - (base + unit + i) * 64  # tokens of the sequence from this unit on
            if left < 64:
                _clear_tail(v_s.index(st), left, HD)
            zero = gl.zeros([64, 64], gl.float32, layout=S_L)
            s = warpgroup_mma(q, k_s.index(st).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if CAPPED:  # tanh: its own instruction is good for three digits only
                s = 1.0 - 2.0 / (gl.exp2(s * squeeze) + 1.0)
            seen = gl.expand_dims(cols, 0) < left
            if CAUSAL and QUERIES > 1:
                seen = gl.expand_dims(cols, 0) < gl.expand_dims(left - behind, 1)
            if WINDOW > 0:
                seen &= gl.expand_dims(cols, 0) >= gl.expand_dims(left - behind - WINDOW, 1)
            if SKIPS:
                seen &= gl.expand_dims(cols, 0) >= left - length + skip
            s = gl.where(seen, s, float("-inf"))  # so p is 0 even where m is -1e30, as no key was seen yet
            new = gl.maximum(m, gl.max(s, 1))
            old = gl.exp2((m - new) * scale)
            p = gl.exp2(s * scale - gl.expand_dims(new * scale, 1))
            total = total * old + gl.sum(p, 1)
            m = new
            acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, O_L)), 1)
            acc = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_L), v_s.index(st), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(st), count=1)
            it += 1
        tile = b * KV_HEADS + h
        mo = gl.convert_layout(m, gl.SliceLayout(1, O_L))
        to = gl.convert_layout(total, gl.SliceLayout(1, O_L))
        if PARTS > 0:
            keep_part(Part, Stat, tile * PARTS + unit // size, acc, mo, to, USED, ROWS, HD)
        elif take == n:
            write_result(Out, Lse, b, h, acc, mo, to, scale, KV_HEADS, GROUP, HD, QUERIES, WITH_LSE)
        else:
            first_program = ((first + 1) * used - 1) // units
            last_program = ((first + n) * used - 1) // units
            slot = 2 * c + gl.where(mine < first, 1, 0)
            keep_part(Part, Stat, slot, acc, mo, to, USED, ROWS, HD)
            _barrier()
            if gl.atomic_add(Count + tile, 1, sem="acq_rel") == last_program - first_program:
                gl.store(Count + tile, 0)
                shift = gl.where(first_program * units // used < first, 1, 0)
                parts = last_program - first_program + 1
                merge_cut_tile(Part, Stat, Out, Lse, b, h, 2 * first_program, shift, parts, scale,
                               KV_HEADS, GROUP, ROWS, HD, QUERIES, WITH_LSE)  # fmt: skip
        todo -= take
        unit += take
        if (unit == n) & (todo > 0):
            first += n
            unit = gl.to_tensor(0)
            h += 1
            if h == KV_HEADS:
                h = gl.to_tensor(0)
                b, length, base, n = _next_sequence(Lens, b, skip, QUERIES, WINDOW, SKIPS)
    if OVERLAP == 3:
        after_previous_kernel()


@gluon.jit(do_not_specialize=["q_stride", "table_stride", "first_row", "page_rows", "tokens", "seqs"])
def decode_kernel(
    Q, kv_desc, Out, Lse, Table, Lens, Skip, Plan, Part, Stat, Count, scale, squeeze, q_stride, table_stride, first_row,
    page_rows, tokens, seqs, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, ST: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SKIPS: gl.constexpr, PARTS: gl.constexpr, SPLIT: gl.constexpr,
    CAPPED: gl.constexpr, WITH_LSE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Plan: `plan_kernel`'s. Part, Stat, Count: room for partial results; Count is zero before and after.

    first_row: of the layer's K in the pool seen as [rows, d]; page_rows: a page's. ROWS: GROUP * QUERIES' next power of
    two. PARTS: a context is cut by its own length into so many parts at most, of SPLIT units at least, which are left
    to `merge_parts`; 0: by the plan, and the results are written.
    OVERLAP: 0 waits for the previous kernel before it starts, 1 before what that may be writing; 2 lets the next kernel
    run beside it, which with 3 waits for it at its own end.
    """
    DTYPE: gl.constexpr = Q.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # Filled as boxes of [BOX, 64], read as [64, HD]: the same bytes, two views.
    k_t = gl.allocate_shared_memory(DTYPE, [ST * (HD // 64) * (64 // BOX), BOX, 64], LAYOUT)
    v_t = gl.allocate_shared_memory(DTYPE, [ST * (HD // 64) * (64 // BOX), BOX, 64], LAYOUT)
    k_s = k_t._reinterpret(DTYPE, [ST, 64, HD], LAYOUT)
    v_s = v_t._reinterpret(DTYPE, [ST, 64, HD], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    if OVERLAP == 1 or OVERLAP == 2:
        let_next_kernel_start()
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (Q, k_s, v_s, full, empty, Out, Lse, Lens, Skip, Plan, Part, Stat, Count, scale, squeeze, q_stride,
                     tokens, seqs, KV_HEADS, GROUP, ROWS, HD, ST, QUERIES, CAUSAL, WINDOW, SKIPS, PARTS, SPLIT,
                     CAPPED, WITH_LSE, OVERLAP)),
        (_producer, (kv_desc, k_t, v_t, full, empty, Table, Lens, Skip, Plan, table_stride, first_row, page_rows,
                     KV_HEADS, HD, PAGE, BOX, ST, QUERIES, CAUSAL, WINDOW, SKIPS, OVERLAP)),
    ], [1], [40])  # fmt: skip
