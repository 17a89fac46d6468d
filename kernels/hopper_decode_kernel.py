# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""The device side of `hopper_decode`: paged flash decoding (Dao et al. 2023) in Gluon, shared out as stream-K.

Work is cut into units of 64 tokens of one KV head. `plan_kernel` gives each program an equal run of units, from lengths
that live on the device, so one CUDA graph serves changing lengths. In a program one warp does nothing but fetch: it
keeps K and V of two or three units in flight by TMA, across heads and sequences; the other four compute. A head whose
units were cut is merged by whichever program finishes it last.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# All threads of the warps that reach it; Triton 3.7 has it under a new name.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@triton.jit(do_not_specialize=["seqs", "programs"])
def plan_kernel(Lens, Plan, seqs, programs, KV_HEADS: tl.constexpr, SEQS: tl.constexpr):
    """Each program's run of (sequence, head, unit), 32 programs a block.

    Plan: units, programs used, then 8 ints a program: sequence, head, first unit, units to do, units of the sequence,
    its length, the number of its head's first unit, 0.
    """
    seq = tl.arange(0, SEQS)
    lens = tl.load(Lens + seq, mask=seq < seqs, other=0)
    units_of = (lens + 63) // 64 * KV_HEADS
    ends = tl.cumsum(units_of, 0)
    units = tl.sum(units_of, 0)
    used = tl.maximum(tl.minimum(programs, units), 1)
    c = tl.program_id(0) * 32 + tl.arange(0, 32)
    start = c * units // used
    todo = (c + 1) * units // used - start
    b = tl.sum(((ends[None, :] <= start[:, None]) & (seq[None, :] < seqs)).to(tl.int32), 1)
    ok = (c < used) & (b < seqs)
    offset = start - tl.sum(tl.where(seq[None, :] == b[:, None] - 1, ends[None, :], 0), 1)
    length = tl.load(Lens + b, mask=ok, other=1)
    n = (length + 63) // 64
    record = Plan + 8 + c * 8
    tl.store(record, b)
    tl.store(record + 1, offset // n)
    tl.store(record + 2, offset % n)
    tl.store(record + 3, tl.where(ok, todo, 0))
    tl.store(record + 4, n)
    tl.store(record + 5, length)
    tl.store(record + 6, start - offset % n)
    tl.store(Plan, units)
    tl.store(Plan + 1, used)


@gluon.jit
def _after_previous_kernel():
    """Nothing below runs before the kernels in front of this one in the stream have ended (a no-op where they have)."""
    x = gl.to_tensor(0)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_next_kernel_start():
    x = gl.to_tensor(0)
    asm: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], gl.int32, is_pure=False, pack=1)


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
def _next_sequence(Lens, b):
    b += 1
    length = gl.load(Lens + b)
    while length == 0:
        b += 1
        length = gl.load(Lens + b)
    return b, length


@gluon.jit
def _producer(
    kv_desc, k_t, v_t, full, empty, Table, Lens, Plan, table_stride, first_row, page_rows,
    KV_HEADS: gl.constexpr, HD: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, ST: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = 64 // BOX
    to_v = KV_HEADS * PAGE
    record = Plan + 8 + gl.program_id(0) * 8
    todo = gl.load(record + 3)
    b = gl.load(record)
    h = gl.load(record + 1)
    unit = gl.load(record + 2)
    n = gl.load(record + 4)
    length = gl.load(record + 5)
    it = gl.to_tensor(0)
    while todo > 0:
        take = gl.minimum(todo, n - unit)
        row = Table + b.to(gl.int64) * table_stride
        last = (length - 1) // PAGE
        p0, p1, p2, p3 = _page_ids(row, unit, last, PAGE)
        for i in range(take):
            if OVERLAP:  # noqa: SIM102 (a compile-time branch)
                if unit + i == n - 1:  # it holds the newest token, which the previous kernel may be writing
                    _after_previous_kernel()
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
            p0, p1, p2, p3 = _page_ids(row, gl.minimum(unit + i + 1, n - 1), last, PAGE)
        todo -= take
        unit = 0
        h += 1
        if (h == KV_HEADS) & (todo > 0):
            h = 0
            b, length = _next_sequence(Lens, b)
            n = (length + 63) // 64


@gluon.jit
def _merge(
    Part, Stat, Out, Lse, head, slot0, shift, parts, scale,
    GROUP: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Join `parts` partial results of one KV head's query heads: slots slot0 (+ shift), slot0 + 2, ..."""
    NP: gl.constexpr = 32 if ROWS <= 4 else (16 if ROWS == 8 else 64 // ROWS)  # as many as registers hold
    THREADS: gl.constexpr = 32 if HD == 128 else 16
    L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // THREADS, THREADS], [1, 4, 1], [2, 1, 0])
    L2: gl.constexpr = gl.SliceLayout(2, L3)
    LO: gl.constexpr = gl.SliceLayout(0, L3)
    r = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, L2)), 0)
    r3 = gl.expand_dims(r, 2)
    d3 = gl.expand_dims(gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3))), 0), 1)
    m = gl.full([ROWS], -1.0e30, gl.float32, layout=gl.SliceLayout(0, L2))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(0, L2))
    acc = gl.zeros([ROWS, HD], gl.float32, layout=LO)
    for j0 in range(0, parts, NP):
        j = gl.expand_dims(j0 + gl.arange(0, NP, layout=gl.SliceLayout(1, L2)), 1)
        slot = slot0 + 2 * j + gl.where(j == 0, shift, 0)
        ok = j < parts
        # .cg: other programs wrote these, the first-level cache may be older
        pm = gl.load(Stat + slot * (2 * ROWS) + r, mask=ok, other=-1.0e30, cache_modifier=".cg")
        pl = gl.load(Stat + slot * (2 * ROWS) + ROWS + r, mask=ok, other=0.0, cache_modifier=".cg")
        at = gl.expand_dims(slot, 2) * (ROWS * HD) + r3 * HD + d3
        part = gl.load(Part + at, mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg")
        new = gl.maximum(m, gl.max(pm, 0))
        w = gl.exp2((pm - gl.expand_dims(new, 0)) * scale)
        old = gl.exp2((m - new) * scale)
        total = total * old + gl.sum(pl * w, 0)
        kept = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, LO)), 1)
        acc = kept + gl.sum(part * gl.expand_dims(w, 2), 0)
        m = new
    ro = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LO))
    do = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, LO)), 0)
    out = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, LO)), 1)
    at = (head * GROUP + gl.expand_dims(ro, 1)) * HD + do
    gl.store(Out + at, out.to(Out.dtype.element_ty), mask=gl.expand_dims(ro, 1) < GROUP)
    if WITH_LSE:
        rl = gl.arange(0, ROWS, layout=gl.SliceLayout(0, L2))
        gl.store(Lse + head * GROUP + rl, (m * scale + gl.log2(total)) * 0.6931471805599453, mask=rl < GROUP)


@gluon.jit
def _write_empty(Out, Lse, Lens, seqs, HEADS: gl.constexpr, HD: gl.constexpr, WITH_LSE: gl.constexpr):
    """Rows without a context (a graph's padding): zeros, and a log-sum-exp of minus infinity."""
    L: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    for b in range(gl.program_id(0), seqs, gl.num_programs(0)):
        if gl.load(Lens + b) == 0:
            for at in range(0, HEADS * HD, 1024):
                x = at + gl.arange(0, 1024, layout=L)
                zero = gl.full([1024], 0.0, Out.dtype.element_ty, layout=L)
                gl.store(Out + b * (HEADS * HD) + x, zero, mask=x < HEADS * HD)
                if WITH_LSE:
                    minus = gl.full([1024], float("-inf"), gl.float32, layout=L)
                    gl.store(Lse + b * HEADS + x, minus, mask=x < HEADS)


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
    Q, k_s, v_s, full, empty, Out, Lse, Lens, Plan, Part, Stat, Count, scale, q_stride, seqs,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr, ST: gl.constexpr,
    WITH_LSE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    Q_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_L, k_width=2)
    DTYPE: gl.constexpr = Q.dtype.element_ty
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
    mine = c * units // used
    if OVERLAP:
        _after_previous_kernel()
    _write_empty(Out, Lse, Lens, seqs, KV_HEADS * GROUP, HD, WITH_LSE)
    it = gl.to_tensor(0)
    qr = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, Q_L)), 1)
    qd = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, Q_L)), 0)
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, S_L))
    orow = gl.arange(0, 64, layout=gl.SliceLayout(1, O_L))
    ocol = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, O_L)), 0)
    er = gl.expand_dims(orow, 1)
    while todo > 0:
        take = gl.minimum(todo, n - unit)
        q = gl.load(Q + b.to(gl.int64) * q_stride + (h * GROUP + qr) * HD + qd, mask=qr < GROUP, other=0.0)
        acc = gl.zeros([64, HD], gl.float32, layout=O_L)
        m = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S_L))
        total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_L))
        for i in range(take):
            st = it % ST
            mbarrier.wait(full.index(st), (it // ST) & 1)
            left = length - (unit + i) * 64  # tokens of the sequence from this unit on
            if left < 64:
                _clear_tail(v_s.index(st), left, HD)
            zero = gl.zeros([64, 64], gl.float32, layout=S_L)
            s = warpgroup_mma(q, k_s.index(st).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            s = gl.where(gl.expand_dims(cols, 0) < left, s, -1.0e30)
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
        head = b * KV_HEADS + h
        mo = gl.convert_layout(m, gl.SliceLayout(1, O_L))
        to = gl.convert_layout(total, gl.SliceLayout(1, O_L))
        if take == n:
            out = (acc / gl.expand_dims(to, 1)).to(DTYPE)
            gl.store(Out + (head * GROUP + er) * HD + ocol, out, mask=er < GROUP)
            if WITH_LSE:
                lse = (mo * scale + gl.log2(to)) * 0.6931471805599453
                gl.store(Lse + head * GROUP + orow, lse, mask=orow < GROUP)
        else:
            first_program = ((first + 1) * used - 1) // units
            last_program = ((first + n) * used - 1) // units
            slot = 2 * c + gl.where(mine < first, 1, 0)
            gl.store(Part + slot * (ROWS * HD) + er * HD + ocol, acc, mask=er < GROUP)
            gl.store(Stat + slot * (2 * ROWS) + orow, mo, mask=orow < GROUP)
            gl.store(Stat + slot * (2 * ROWS) + ROWS + orow, to, mask=orow < GROUP)
            _barrier()
            if gl.atomic_add(Count + head, 1, sem="acq_rel") == last_program - first_program:
                gl.store(Count + head, 0)
                shift = gl.where(first_program * units // used < first, 1, 0)
                parts = last_program - first_program + 1
                slot0 = 2 * first_program
                _merge(Part, Stat, Out, Lse, head, slot0, shift, parts, scale, GROUP, ROWS, HD, WITH_LSE)
        todo -= take
        first += n
        unit = 0
        h += 1
        if (h == KV_HEADS) & (todo > 0):
            h = 0
            b, length = _next_sequence(Lens, b)
            n = (length + 63) // 64


@gluon.jit(do_not_specialize=["q_stride", "table_stride", "first_row", "page_rows", "seqs"])
def decode_kernel(
    Q, kv_desc, Out, Lse, Table, Lens, Plan, Part, Stat, Count, scale, q_stride, table_stride, first_row, page_rows,
    seqs, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr, PAGE: gl.constexpr,
    BOX: gl.constexpr, ST: gl.constexpr, WITH_LSE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Plan: `plan_kernel`'s. Part, Stat, Count: room for partial results; Count is zero before and after.

    first_row: of the layer's K in the pool seen as [rows, d]; page_rows: a page's. ROWS: GROUP's next power of two.
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
    if OVERLAP:
        _let_next_kernel_start()
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (Q, k_s, v_s, full, empty, Out, Lse, Lens, Plan, Part, Stat, Count, scale, q_stride, seqs,
                     KV_HEADS, GROUP, ROWS, HD, ST, WITH_LSE, OVERLAP)),
        (_producer, (kv_desc, k_t, v_t, full, empty, Table, Lens, Plan, table_stride, first_row, page_rows,
                     KV_HEADS, HD, PAGE, BOX, ST, OVERLAP)),
    ], [1], [40])  # fmt: skip
