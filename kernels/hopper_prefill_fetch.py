# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""The fetching warp of `hopper_prefill_kernel`: pages become stages of K and V by TMA, queries become Q buffers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.hopper_prefill_steps import K_FREE, Q_FREE, V_FREE, bar_sync


@gluon.jit
def _fetch(kv_desc, row, bar, dst, box, WIDE: gl.constexpr, BOXES: gl.constexpr):
    """One box of a page, in columns of 64: the swizzle's width. Columns past head_dim arrive as zeros."""
    for col in gl.static_range(WIDE // 64):
        tma.async_copy_global_to_shared(kv_desc, [row, col * 64], bar, dst.index(box + col * BOXES))


@gluon.jit
def _fetch_block(
    kv_desc, page0, page1, table, block, last, inside, page_rows, bar, dst, st,
    WIDE: gl.constexpr, KEYS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """A block of K or V. page0 and page1 are loaded ahead; small pages are looked up here."""
    mbarrier.expect(bar, KEYS * WIDE * 2)
    box = st * (WIDE // 64) * BOXES
    if BOXES <= 2:
        _fetch(kv_desc, page0 * page_rows + inside, bar, dst, box, WIDE, BOXES)
        if BOXES == 2:
            _fetch(kv_desc, page1 * page_rows + inside, bar, dst, box + 1, WIDE, BOXES)
    else:
        for i in gl.static_range(BOXES):
            page = gl.load(table + gl.minimum(block * BOXES + i, last))
            _fetch(kv_desc, page * page_rows + inside, bar, dst, box + i, WIDE, BOXES)


@gluon.jit
def _slot(block, BOXES: gl.constexpr, HALVES: gl.constexpr):
    """Where the page table names the first page of a block, or the page that the block is a part of."""
    return block // HALVES * BOXES  # one of the two is 1


@gluon.jit
def fetch_tiles(
    q_desc, kv_desc, q_s, k_t, v_t, q_full, k_full, v_full, Table, Tiles, Counts, rounds, first_row, page_rows,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HD: gl.constexpr, WIDE: gl.constexpr,
    KEYS: gl.constexpr, PAGE: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = max(KEYS // PAGE, 1)  # of a block
    HALVES: gl.constexpr = max(PAGE // KEYS, 1)  # blocks of a page
    count = gl.load(Counts + gl.program_id(0))
    tiles = Tiles + gl.program_id(0) * rounds * 8
    it = gl.to_tensor(0)
    for r in range(count):
        tile = tiles + r * 8
        q_row = gl.load(tile)
        work = gl.load(tile + 2)
        table = Table + gl.load(tile + 4)
        last = gl.load(tile + 5)
        blocks = work & 0xFFFF
        head = work >> 16
        inside = first_row + head // (HEADS // KV_HEADS) * PAGE
        page0 = gl.load(table + gl.minimum(_slot(blocks - 1, BOXES, HALVES), last))
        page1 = gl.load(table + gl.minimum(_slot(blocks - 1, BOXES, HALVES) + BOXES - 1, last))
        for j in range(blocks):
            block = blocks - 1 - j
            following = _slot(gl.maximum(block - 1, 0), BOXES, HALVES)
            now0, now1 = page0, page1
            page0 = gl.load(table + following)
            page1 = gl.load(table + gl.minimum(following + BOXES - 1, last))
            st = it % ST
            row = inside
            if HALVES > 1:
                row += block % HALVES * KEYS
            if it >= ST:
                bar_sync(K_FREE + st, 128 * GROUPS + 32)
            _fetch_block(kv_desc, now0, now1, table, block, last, row, page_rows, k_full.index(st), k_t, st,
                         WIDE, KEYS, BOXES)  # fmt: skip
            if j == 0:  # Q after the first K: K's stage is free earlier
                if r >= QB:
                    bar_sync(Q_FREE + r % QB, 128 * GROUPS + 32)
                for g in gl.static_range(GROUPS):
                    qi = (r % QB) * GROUPS + g
                    mbarrier.expect(q_full.index(qi), 64 * WIDE * 2)
                    tma.async_copy_global_to_shared(
                        q_desc, [q_row + 64 * g, head * HD], q_full.index(qi), q_s.index(qi)
                    )
            if it >= ST:
                bar_sync(V_FREE + st, 128 * GROUPS + 32)
            to_v = KV_HEADS * PAGE
            _fetch_block(kv_desc, now0, now1, table, block, last, row + to_v, page_rows, v_full.index(st), v_t, st,
                         WIDE, KEYS, BOXES)  # fmt: skip
            it += 1
    # What was released and not filled again: every arrival has its counterpart.
    for i in range(gl.maximum(it - ST, 0), it):
        bar_sync(K_FREE + i % ST, 128 * GROUPS + 32)
        bar_sync(V_FREE + i % ST, 128 * GROUPS + 32)
    for i in range(gl.maximum(count - QB, 0), count):
        bar_sync(Q_FREE + i % QB, 128 * GROUPS + 32)
