# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""What a program of `decode_kernel` writes: results, parts of results, and the merge of a tile that programs shared."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def token_and_head(b, h, row, GROUP: gl.constexpr, QUERIES: gl.constexpr):
    """Which token of the batch, and which of its heads, a tile's row is."""
    if QUERIES == 1:
        return b, h * GROUP + row
    else:  # noqa: RET505 (a compile-time branch)
        return b * QUERIES + row // GROUP, h * GROUP + row % GROUP


@gluon.jit
def write_result(
    Out, Lse, b, h, acc, m, total, scale, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HD: gl.constexpr,
    QUERIES: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """The whole result of one tile: acc [64, HD], and each row's maximum and sum."""
    LAYOUT: gl.constexpr = acc.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    col = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, LAYOUT)), 0)
    token, head = token_and_head(b, h, row, GROUP, QUERIES)
    at = token * (KV_HEADS * GROUP) + head
    used = row < GROUP * QUERIES
    out = (acc / gl.expand_dims(total, 1)).to(Out.dtype.element_ty)
    gl.store(Out + gl.expand_dims(at, 1) * HD + col, out, mask=gl.expand_dims(used, 1))
    if WITH_LSE:
        gl.store(Lse + at, (m * scale + gl.log2(total)) * 0.6931471805599453, mask=used)


@gluon.jit
def keep_part(Part, Stat, slot, acc, m, total, USED: gl.constexpr, ROWS: gl.constexpr, HD: gl.constexpr):
    """A partial result of one tile, of which USED rows count."""
    LAYOUT: gl.constexpr = acc.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    col = gl.expand_dims(gl.arange(0, HD, layout=gl.SliceLayout(0, LAYOUT)), 0)
    rows = gl.expand_dims(row, 1)
    gl.store(Part + slot * (ROWS * HD) + rows * HD + col, acc, mask=rows < USED)
    gl.store(Stat + slot * (2 * ROWS) + row, m, mask=row < USED)
    gl.store(Stat + slot * (2 * ROWS) + ROWS + row, total, mask=row < USED)


@gluon.jit
def merge_cut_tile(
    Part, Stat, Out, Lse, b, h, slot0, shift, parts, scale, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, HD: gl.constexpr, QUERIES: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Join `parts` partial results of one tile: slots slot0 (+ shift), slot0 + 2, ..."""
    HEADS: gl.constexpr = KV_HEADS * GROUP
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
    ro = gl.expand_dims(ro, 1)
    token, head = token_and_head(b, h, ro, GROUP, QUERIES)
    at = (token * HEADS + head) * HD + do
    gl.store(Out + at, out.to(Out.dtype.element_ty), mask=ro < GROUP * QUERIES)
    if WITH_LSE:
        rl = gl.arange(0, ROWS, layout=gl.SliceLayout(0, L2))
        token, head = token_and_head(b, h, rl, GROUP, QUERIES)
        lse = (m * scale + gl.log2(total)) * 0.6931471805599453
        gl.store(Lse + token * HEADS + head, lse, mask=rl < GROUP * QUERIES)


@gluon.jit
def write_empty(Out, Lse, Lens, skip, seqs, HEADS: gl.constexpr, HD: gl.constexpr, WITH_LSE: gl.constexpr):
    """Sequences without a context (a graph's padding): zeros, and a log-sum-exp of minus infinity."""
    L: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    for b in range(gl.program_id(0), seqs, gl.num_programs(0)):
        if gl.load(Lens + b) <= skip:
            for at in range(0, HEADS * HD, 1024):
                x = at + gl.arange(0, 1024, layout=L)
                zero = gl.full([1024], 0.0, Out.dtype.element_ty, layout=L)
                gl.store(Out + b * (HEADS * HD) + x, zero, mask=x < HEADS * HD)
                if WITH_LSE:
                    minus = gl.full([1024], float("-inf"), gl.float32, layout=L)
                    gl.store(Lse + b * HEADS + x, minus, mask=x < HEADS)
