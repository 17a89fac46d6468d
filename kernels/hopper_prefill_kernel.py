# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""The device side of `hopper_prefill`: FlashAttention forward over paged KV in Gluon.

A persistent program: one warp fetches by TMA, two or three groups of four warps compute 64 query rows each (warp roles
as in FlashAttention-3, Shah et al. 2024). A step handles a block of 128 keys, or of 64 where heads are wider than 128;
they go from the newest to the oldest, so that only the first steps mask, and the last ones where there is a window.
- Two groups, 240 registers a thread: S(n) = Q K(n)^T and O += P(n+1) V(n+1) are issued together and the softmax of S(n)
  runs under the second.
- Three groups, 160 registers, at head_dim 64 for long contexts: a step has as much softmax as matrix product there, and
  the groups run under each other. With a window there is no room to carry P: each step is S, softmax, P V.

Heads of 96 are computed as heads of 128 with zeros: TMA brings zeros where a box goes past a row's end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper_prefill_fetch import fetch_tiles
from kernels.hopper_prefill_steps import (
    K_FREE,
    Q_FREE,
    V_FREE,
    bar_arrive,
    cap,
    clear_tail,
    lane_sums,
    mask,
    overlapped_step,
    plain_step,
    store_lse,
    store_rows,
)


@gluon.jit
def _record(tile):
    return gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3)


@gluon.jit
def _compute_tiles(
    q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, HD: gl.constexpr, WIDE: gl.constexpr,
    KEYS: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr, STORE_L: gl.constexpr, LANE_ROWS: gl.constexpr,
    WITH_LSE: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    CARRY: gl.constexpr = GROUPS == 2 or WINDOW == 0  # P, from a step to the next
    count = gl.load(Counts + gl.program_id(0))
    tiles = Tiles + gl.program_id(0) * rounds * 8
    it = gl.to_tensor(0)
    q_row, sees, work, edge = _record(tiles)
    for r in range(count):
        if GROUPS == 3:  # no registers to load it ahead
            q_row, sees, work, edge = _record(tiles + r * 8)
        blocks = work & 0xFFFF
        qi = (r % QB) * GROUPS + GROUP
        q = q_s.index(qi)
        sees += GROUP * 64  # the last key that this group's first row sees
        unmasked = gl.minimum((sees + 1) // KEYS, blocks - 1)
        oldest = 0
        if WINDOW:  # blocks with keys that are too old for some row
            oldest = gl.minimum((gl.maximum(sees + 64 - WINDOW, 0) + KEYS - 1) // KEYS, unmasked)
            unmasked -= oldest
        acc = gl.zeros([64, WIDE], gl.float32, layout=O_L)
        ks, phase = it % ST, (it // ST) & 1
        mbarrier.wait(q_full.index(qi), (r // QB) & 1)
        if edge < KEYS * 256:  # the last block is not full
            mbarrier.wait(v_full.index(ks), phase)
            clear_tail(v_s.index(ks), edge >> 8, GROUP, GROUPS, WIDE, KEYS)
        if CARRY:
            mbarrier.wait(k_full.index(ks), phase)
            zero = gl.zeros([64, KEYS], gl.float32, layout=S_L)
            s = warpgroup_mma(q, k_s.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            bar_arrive(K_FREE + ks, 128 * GROUPS + 32)
            s = mask(cap(s, HD, SOFT_CAP), sees - (blocks - 1) * KEYS, KEYS, WINDOW)
            m = gl.max(s, 1)
            p = gl.exp2(s * scale - gl.expand_dims(m * scale, 1))
            total = lane_sums(p, KEYS)
            mbarrier.wait(v_full.index(ks), phase)
            it += 1
            for i in range(blocks - 1 - oldest - unmasked):
                acc, m, total, p = overlapped_step(
                    acc, m, total, p, it, blocks - 2 - i, q, k_s, v_s, k_full, v_full, sees, scale,
                    ST, GROUPS, True, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                it += 1
            for _i in range(unmasked):
                acc, m, total, p = overlapped_step(
                    acc, m, total, p, it, 0, q, k_s, v_s, k_full, v_full, sees, scale,
                    ST, GROUPS, False, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                it += 1
            if WINDOW:
                for i in range(oldest):
                    acc, m, total, p = overlapped_step(
                        acc, m, total, p, it, oldest - 1 - i, q, k_s, v_s, k_full, v_full, sees, scale,
                        ST, GROUPS, True, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                    it += 1
            bar_arrive(Q_FREE + r % QB, 128 * GROUPS + 32)
            vs = (it - 1) % ST
            acc = warpgroup_mma(gl.convert_layout(p.to(q.dtype), P_L), v_s.index(vs), acc, is_async=True)
        else:
            m = gl.full([64], -1.2676506002282294e30, gl.float32, layout=gl.SliceLayout(1, S_L))
            total = lane_sums(gl.zeros([64, KEYS], gl.float32, layout=S_L), KEYS)
            for i in range(blocks - oldest - unmasked):
                acc, m, total = plain_step(
                    acc, m, total, it, blocks - 1 - i, q, k_s, v_s, k_full, v_full, sees, scale,
                    ST, GROUPS, True, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                it += 1
            for _i in range(unmasked):
                acc, m, total = plain_step(
                    acc, m, total, it, 0, q, k_s, v_s, k_full, v_full, sees, scale,
                    ST, GROUPS, False, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                it += 1
            for i in range(oldest):
                acc, m, total = plain_step(
                    acc, m, total, it, oldest - 1 - i, q, k_s, v_s, k_full, v_full, sees, scale,
                    ST, GROUPS, True, HD, KEYS, WINDOW, SOFT_CAP, S_L, P_L, O_L)  # fmt: skip
                it += 1
            bar_arrive(Q_FREE + r % QB, 128 * GROUPS + 32)
        if GROUPS == 2:
            following = gl.minimum(r + 1, count - 1)  # its record is loaded under the last product
            next_row, next_sees, next_work, next_edge = _record(tiles + following * 8)
        if CARRY:
            acc = warpgroup_mma_wait(0, deps=[acc])
            bar_arrive(V_FREE + (it - 1) % ST, 128 * GROUPS + 32)
        whole = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_L))
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / whole, gl.SliceLayout(1, O_L)), 1)
        head = work >> 16
        first, inside = q_row + GROUP * 64, (edge & 0xFF) - GROUP * 64
        out = gl.convert_layout(acc.to(q.dtype), STORE_L)
        store_rows(Out, out, first, inside, head * HD, HEADS * HD, HD, WIDE, LANE_ROWS)
        if WITH_LSE:
            lse = (m * scale + gl.log2(whole)) * 0.6931471805599453
            store_lse(Lse, lse, first, inside, head, HEADS)
        if GROUPS == 2:
            q_row, sees, work, edge = next_row, next_sees, next_work, next_edge


@gluon.jit(do_not_specialize=["rounds", "first_row", "page_rows"])
def prefill_kernel(
    q_desc, kv_desc, Out, Lse, Table, Tiles, Counts, rounds, scale, first_row, page_rows,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HD: gl.constexpr, WIDE: gl.constexpr,
    KEYS: gl.constexpr, PAGE: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr, STORE_L: gl.constexpr,
    LANE_ROWS: gl.constexpr, WITH_LSE: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """Tiles and Counts: `PrefillTiles`. first_row: of the layer's K in the pool seen as [rows, d]; page_rows: a page's.

    rounds: tiles of a program at most. scale takes scores, or what `cap` makes of them, to base 2. WIDE: head_dim as it
    is computed. KEYS of a step. ST stages of K and V (4 at most), QB buffers of Q (2 at most). WINDOW and SOFT_CAP: 0
    where there is none.
    """
    DTYPE: gl.constexpr = Out.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BOX: gl.constexpr = min(KEYS, PAGE)
    BOXES: gl.constexpr = ST * (WIDE // 64) * (KEYS // BOX)
    q_s = gl.allocate_shared_memory(DTYPE, [QB * GROUPS, 64, WIDE], LAYOUT)
    # Filled as boxes of [BOX, 64], read as [KEYS, WIDE]: the same bytes, two views.
    k_t = gl.allocate_shared_memory(DTYPE, [BOXES, BOX, 64], LAYOUT)
    v_t = gl.allocate_shared_memory(DTYPE, [BOXES, BOX, 64], LAYOUT)
    k_s = k_t._reinterpret(DTYPE, [ST, KEYS, WIDE], LAYOUT)
    v_s = v_t._reinterpret(DTYPE, [ST, KEYS, WIDE], LAYOUT)
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
            (_compute_tiles, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
                              0, GROUPS, HEADS, HD, WIDE, KEYS, ST, QB, STORE_L, LANE_ROWS, WITH_LSE,
                              WINDOW, SOFT_CAP)),
            (_compute_tiles, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
                              1, GROUPS, HEADS, HD, WIDE, KEYS, ST, QB, STORE_L, LANE_ROWS, WITH_LSE,
                              WINDOW, SOFT_CAP)),
            (fetch_tiles, (q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, rounds,
                           first_row, page_rows, GROUPS, HEADS, KV_HEADS, HD, WIDE, KEYS, PAGE, ST, QB)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute_tiles, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
                              0, GROUPS, HEADS, HD, WIDE, KEYS, ST, QB, STORE_L, LANE_ROWS, WITH_LSE,
                              WINDOW, SOFT_CAP)),
            (_compute_tiles, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
                              1, GROUPS, HEADS, HD, WIDE, KEYS, ST, QB, STORE_L, LANE_ROWS, WITH_LSE,
                              WINDOW, SOFT_CAP)),
            (_compute_tiles, (q_s, k_s, v_s, q_full, k_full, v_full, Out, Lse, Tiles, Counts, rounds, scale,
                              2, GROUPS, HEADS, HD, WIDE, KEYS, ST, QB, STORE_L, LANE_ROWS, WITH_LSE,
                              WINDOW, SOFT_CAP)),
            (fetch_tiles, (q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, rounds,
                           first_row, page_rows, GROUPS, HEADS, KV_HEADS, HD, WIDE, KEYS, PAGE, ST, QB)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
