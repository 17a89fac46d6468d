# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""The device side of `hopper_prefill`: FlashAttention forward over paged KV in Gluon.

A persistent program: one warp fetches by TMA, two or three groups of four warps compute 64 query rows each (warp roles
as in FlashAttention-3, Shah et al. 2024). A step handles 128 keys; they go from the newest to the oldest, so that only
the first steps mask.
- Two groups, 240 registers a thread: S(n) = Q K(n)^T and O += P(n+1) V(n+1) are issued together and the softmax of S(n)
  runs under the second.
- Three groups, 160 registers: no room to carry P, each step is S, softmax, P V; the groups run under each other. At
  head_dim 64, where a step has as much softmax as matrix product, this is faster for long contexts.

The computing groups tell the fetching warp that a buffer is free through named barriers: Triton's mbarrier.arrive
brings a barrier of the whole group with it, four of them a step.
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

# Named barriers, of the 16 that a program has; Triton numbers its own from 0 and uses five here at most.
TAIL = gl.constexpr(5)  # the groups cleared V's rows past the sequence
Q_FREE = gl.constexpr(6)  # + Q buffer
K_FREE = gl.constexpr(8)  # + stage
V_FREE = gl.constexpr(12)  # + stage


@gluon.jit
def _bar_sync(barrier, THREADS: gl.constexpr):
    x = gl.to_tensor(barrier)
    n = gl.to_tensor(THREADS)
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [x, n], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _bar_arrive(barrier, THREADS: gl.constexpr):
    x = gl.to_tensor(barrier)
    n = gl.to_tensor(THREADS)
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [x, n], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _lane_sums(p):
    """Row sums of p [64, 128], one partial sum a lane, [64, 4]: the loop needs no shuffle for them."""
    return gl.sum(gl.sum(gl.reshape(p, (64, 16, 4, 2)), 3), 1)


@gluon.jit
def _mask(s, rows, first_key, cols):
    """-2^100: times the scale it is exact, so that a row with nothing but masked keys gives exp2(0)."""
    return gl.where(gl.expand_dims(cols, 0) <= gl.expand_dims(rows - first_key, 1), s, -1.2676506002282294e30)


@gluon.jit
def _softmax(s, m, total, scale):
    new = gl.maximum(m, gl.max(s, 1))
    old = gl.exp2((m - new) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(new * scale, 1))
    kept = gl.convert_layout(old, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    total = total * gl.expand_dims(kept, 1) + _lane_sums(p)
    return p, old, new, total


@gluon.jit
def _overlapped_step(
    acc, m, total, p, it, block, q, k_s, v_s, k_full, v_full, rows, cols, scale,
    ST: gl.constexpr, GROUPS: gl.constexpr, MASK: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """S of this block and P V of the one before. p crosses the loop as float32 (bf16 would be taken apart and packed
    again); the wait for V, a branch, keeps the compiler from moving the wait for P V above the exponentials."""
    ks, phase = it % ST, (it // ST) & 1
    vs = (it - 1) % ST
    mbarrier.wait(k_full.index(ks), phase)
    zero = gl.zeros([64, 128], gl.float32, layout=S_L)
    s = warpgroup_mma(q, k_s.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(gl.convert_layout(p.to(q.dtype), P_L), v_s.index(vs), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    _bar_arrive(K_FREE + ks, 128 * GROUPS + 32)
    if MASK:
        s = _mask(s, rows, block * 128, cols)
    p, old, m, total = _softmax(s, m, total, scale)
    mbarrier.wait(v_full.index(ks), phase)
    acc, p, total = warpgroup_mma_wait(0, deps=[acc, p, total])
    _bar_arrive(V_FREE + vs, 128 * GROUPS + 32)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, O_L)), 1)
    return acc, m, total, p


@gluon.jit
def _plain_step(
    acc, m, total, it, block, q, k_s, v_s, k_full, v_full, rows, cols, scale,
    ST: gl.constexpr, GROUPS: gl.constexpr, MASK: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    st, phase = it % ST, (it // ST) & 1
    mbarrier.wait(k_full.index(st), phase)
    zero = gl.zeros([64, 128], gl.float32, layout=S_L)
    s = warpgroup_mma(q, k_s.index(st).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    _bar_arrive(K_FREE + st, 128 * GROUPS + 32)
    if MASK:
        s = _mask(s, rows, block * 128, cols)
    p, old, m, total = _softmax(s, m, total, scale)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, O_L)), 1)
    weights = gl.convert_layout(p.to(q.dtype), P_L)
    mbarrier.wait(v_full.index(st), phase)
    acc = warpgroup_mma(weights, v_s.index(st), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _bar_arrive(V_FREE + st, 128 * GROUPS + 32)
    return acc, m, total


@gluon.jit
def _clear_tail(v, keys, GROUP: gl.constexpr, GROUPS: gl.constexpr, HD: gl.constexpr):
    """Zero V's rows past a sequence's end, half by each of two groups: 0 * NaN of earlier use would be NaN."""
    L: gl.constexpr = gl.BlockedLayout([4, 8], [32 * 8 // HD, HD // 8], [4, 1], [1, 0])
    if GROUP < 2:
        half = v.slice(GROUP * 64, 64, dim=0)
        rows = GROUP * 64 + gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, L)), 1)
        x = half.load(L)
        half.store(gl.where(rows < keys, x, gl.full([64, HD], 0.0, x.dtype, layout=L)))
        fence_async_shared()
    _bar_sync(TAIL, 128 * GROUPS)


@gluon.jit
def _record(tile):
    return gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3)


@gluon.jit
def _consumer(
    q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, HD: gl.constexpr, ST: gl.constexpr,
    QB: gl.constexpr, STORE_L: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    row64 = gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    cols = gl.arange(0, 128, layout=gl.SliceLayout(0, S_L))
    pid, programs = gl.program_id(0), gl.num_programs(0)
    count = gl.load(Counts + pid)
    it = gl.to_tensor(0)
    q_row, sees, work, edge = _record(Tiles + pid * 8)
    for r in range(count):
        if GROUPS == 3:  # no registers to load it ahead
            q_row, sees, work, edge = _record(Tiles + (r * programs + pid) * 8)
        blocks = work & 0xFFFF
        qi = (r % QB) * GROUPS + GROUP
        q = q_s.index(qi)
        sees += GROUP * 64  # the last key that this group's first row sees
        unmasked = gl.minimum((sees + 1) // 128, blocks - 1)
        rows = row64 + sees
        acc = gl.zeros([64, HD], gl.float32, layout=O_L)
        ks, phase = it % ST, (it // ST) & 1
        mbarrier.wait(q_full.index(qi), (r // QB) & 1)
        if edge < 128 * 256:  # the last block is not full
            mbarrier.wait(v_full.index(ks), phase)
            _clear_tail(v_s.index(ks), edge >> 8, GROUP, GROUPS, HD)
        if GROUPS == 2:
            mbarrier.wait(k_full.index(ks), phase)
            zero = gl.zeros([64, 128], gl.float32, layout=S_L)
            s = warpgroup_mma(q, k_s.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            _bar_arrive(K_FREE + ks, 128 * GROUPS + 32)
            s = _mask(s, rows, (blocks - 1) * 128, cols)
            m = gl.max(s, 1)
            p = gl.exp2(s * scale - gl.expand_dims(m * scale, 1))
            total = _lane_sums(p)
            mbarrier.wait(v_full.index(ks), phase)
            it += 1
            for i in range(blocks - 1 - unmasked):
                acc, m, total, p = _overlapped_step(acc, m, total, p, it, blocks - 2 - i, q, k_s, v_s, k_full, v_full,
                                                    rows, cols, scale, ST, GROUPS, True, S_L, P_L, O_L)  # fmt: skip
                it += 1
            for _i in range(unmasked):
                acc, m, total, p = _overlapped_step(acc, m, total, p, it, 0, q, k_s, v_s, k_full, v_full,
                                                    rows, cols, scale, ST, GROUPS, False, S_L, P_L, O_L)  # fmt: skip
                it += 1
            _bar_arrive(Q_FREE + r % QB, 128 * GROUPS + 32)
            vs = (it - 1) % ST
            acc = warpgroup_mma(gl.convert_layout(p.to(q.dtype), P_L), v_s.index(vs), acc, is_async=True)
        else:
            m = gl.full([64], -1.2676506002282294e30, gl.float32, layout=gl.SliceLayout(1, S_L))
            total = _lane_sums(gl.zeros([64, 128], gl.float32, layout=S_L))
            for i in range(blocks - unmasked):
                acc, m, total = _plain_step(acc, m, total, it, blocks - 1 - i, q, k_s, v_s, k_full, v_full, rows, cols,
                                            scale, ST, GROUPS, True, S_L, P_L, O_L)  # fmt: skip
                it += 1
            for _i in range(unmasked):
                acc, m, total = _plain_step(acc, m, total, it, 0, q, k_s, v_s, k_full, v_full, rows, cols,
                                            scale, ST, GROUPS, False, S_L, P_L, O_L)  # fmt: skip
                it += 1
            _bar_arrive(Q_FREE + r % QB, 128 * GROUPS + 32)
        if GROUPS == 2:
            following = gl.minimum(r + 1, count - 1)  # its record is loaded under the last product
            next_row, next_sees, next_work, next_edge = _record(Tiles + (following * programs + pid) * 8)
            acc = warpgroup_mma_wait(0, deps=[acc])
            _bar_arrive(V_FREE + (it - 1) % ST, 128 * GROUPS + 32)
        whole = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_L))
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / whole, gl.SliceLayout(1, O_L)), 1)
        out = gl.convert_layout(acc.to(q.dtype), STORE_L)
        head = work >> 16
        q_rows = edge & 0xFF
        row = GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE_L))
        col = head * HD + gl.arange(0, HD, layout=gl.SliceLayout(0, STORE_L))
        at = gl.expand_dims((q_row + row).to(gl.int64) * (HEADS * HD), 1) + gl.expand_dims(col, 0)
        gl.store(Out + at, out, mask=gl.expand_dims(row < q_rows, 1))
        if WITH_LSE:
            lse_row = GROUP * 64 + row64
            lse = (m * scale + gl.log2(whole)) * 0.6931471805599453
            gl.store(Lse + (q_row + lse_row).to(gl.int64) * HEADS + head, lse, mask=lse_row < q_rows)
        if GROUPS == 2:
            q_row, sees, work, edge = next_row, next_sees, next_work, next_edge


@gluon.jit
def _fetch(kv_desc, row, bar, dst, box, HD: gl.constexpr, BOXES: gl.constexpr):
    """One box of a page, in columns of 64: the swizzle's width."""
    for col in gl.static_range(HD // 64):
        tma.async_copy_global_to_shared(kv_desc, [row, col * 64], bar, dst.index(box + col * BOXES))


@gluon.jit
def _fetch_block(
    kv_desc, page0, page1, table, block, last, inside, page_rows, bar, dst, st,
    HD: gl.constexpr, PAGE: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """128 keys of K or V. page0 and page1 are loaded ahead; small pages are looked up here."""
    mbarrier.expect(bar, 128 * HD * 2)
    box = st * (HD // 64) * BOXES
    if BOXES <= 2:
        _fetch(kv_desc, page0 * page_rows + inside, bar, dst, box, HD, BOXES)
        if BOXES == 2:
            _fetch(kv_desc, page1 * page_rows + inside, bar, dst, box + 1, HD, BOXES)
    else:
        for i in gl.static_range(BOXES):
            page = gl.load(table + gl.minimum(block * BOXES + i, last))
            _fetch(kv_desc, page * page_rows + inside, bar, dst, box + i, HD, BOXES)


@gluon.jit
def _producer(
    q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, first_row, page_rows,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HD: gl.constexpr, PAGE: gl.constexpr,
    ST: gl.constexpr, QB: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = 128 // PAGE
    pid, programs = gl.program_id(0), gl.num_programs(0)
    count = gl.load(Counts + pid)
    it = gl.to_tensor(0)
    for r in range(count):
        tile = Tiles + (r * programs + pid) * 8
        q_row = gl.load(tile)
        work = gl.load(tile + 2)
        table = Table + gl.load(tile + 4)
        last = gl.load(tile + 5)
        blocks = work & 0xFFFF
        head = work >> 16
        inside = first_row + head // (HEADS // KV_HEADS) * PAGE
        page0 = gl.load(table + gl.minimum((blocks - 1) * BOXES, last))
        page1 = gl.load(table + gl.minimum((blocks - 1) * BOXES + BOXES - 1, last))
        for j in range(blocks):
            block = blocks - 1 - j
            following = gl.maximum(block - 1, 0) * BOXES
            now0, now1 = page0, page1
            page0 = gl.load(table + following)
            page1 = gl.load(table + gl.minimum(following + BOXES - 1, last))
            st = it % ST
            if it >= ST:
                _bar_sync(K_FREE + st, 128 * GROUPS + 32)
            _fetch_block(kv_desc, now0, now1, table, block, last, inside, page_rows, k_full.index(st), k_t, st,
                         HD, PAGE, BOXES)  # fmt: skip
            if j == 0:  # Q after the first K: K's stage is free earlier
                if r >= QB:
                    _bar_sync(Q_FREE + r % QB, 128 * GROUPS + 32)
                for g in gl.static_range(GROUPS):
                    qi = (r % QB) * GROUPS + g
                    mbarrier.expect(q_full.index(qi), 64 * HD * 2)
                    row = q_row + 64 * g
                    tma.async_copy_global_to_shared(q_desc, [row, head * HD], q_full.index(qi), q_s.index(qi))
            if it >= ST:
                _bar_sync(V_FREE + st, 128 * GROUPS + 32)
            to_v = KV_HEADS * PAGE
            _fetch_block(kv_desc, now0, now1, table, block, last, inside + to_v, page_rows, v_full.index(st), v_t, st,
                         HD, PAGE, BOXES)  # fmt: skip
            it += 1
    # What was released and not filled again: every arrival has its counterpart.
    for i in range(gl.maximum(it - ST, 0), it):
        _bar_sync(K_FREE + i % ST, 128 * GROUPS + 32)
        _bar_sync(V_FREE + i % ST, 128 * GROUPS + 32)
    for i in range(gl.maximum(count - QB, 0), count):
        _bar_sync(Q_FREE + i % QB, 128 * GROUPS + 32)


@gluon.jit(do_not_specialize=["first_row", "page_rows"])
def prefill_kernel(
    q_desc, kv_desc, Out, Lse, Table, Tiles, Counts, scale, first_row, page_rows,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HD: gl.constexpr, PAGE: gl.constexpr,
    ST: gl.constexpr, QB: gl.constexpr, STORE_L: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Tiles and Counts: `PrefillTiles`. first_row: of the layer's K in the pool seen as [rows, d]; page_rows: a page's.

    ST stages of K and V (4 at most), QB buffers of Q (2 at most).
    """
    DTYPE: gl.constexpr = Out.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BOXES: gl.constexpr = ST * (HD // 64) * (128 // PAGE)
    q_s = gl.allocate_shared_memory(DTYPE, [QB * GROUPS, 64, HD], LAYOUT)
    # Filled as boxes of [PAGE, 64], read as [128, HD]: the same bytes, two views.
    k_t = gl.allocate_shared_memory(DTYPE, [BOXES, PAGE, 64], LAYOUT)
    v_t = gl.allocate_shared_memory(DTYPE, [BOXES, PAGE, 64], LAYOUT)
    k_s = k_t._reinterpret(DTYPE, [ST, 128, HD], LAYOUT)
    v_s = v_t._reinterpret(DTYPE, [ST, 128, HD], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [QB * GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QB * GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_consumer, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
                         0, GROUPS, HEADS, HD, ST, QB, STORE_L, WITH_LSE)),
            (_consumer, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
                         1, GROUPS, HEADS, HD, ST, QB, STORE_L, WITH_LSE)),
            (_producer, (q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, first_row,
                         page_rows, GROUPS, HEADS, KV_HEADS, HD, PAGE, ST, QB)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
                         0, GROUPS, HEADS, HD, ST, QB, STORE_L, WITH_LSE)),
            (_consumer, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
                         1, GROUPS, HEADS, HD, ST, QB, STORE_L, WITH_LSE)),
            (_consumer, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, scale,
                         2, GROUPS, HEADS, HD, ST, QB, STORE_L, WITH_LSE)),
            (_producer, (q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, first_row,
                         page_rows, GROUPS, HEADS, KV_HEADS, HD, PAGE, ST, QB)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
