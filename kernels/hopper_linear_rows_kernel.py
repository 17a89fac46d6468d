# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, attr-defined"
"""The device side of `hopper_linear` for 3 to 16 rows: x [rows, in] @ w [out, in]^T, bound by reading w once.

One program a multiprocessor takes its share of the outputs, 16 or 32 at a time, over all columns; nothing is added up
between programs. w and x come through a ring of buffers in shared memory (asynchronous copies, stages of KT columns);
each warp multiplies a part of a stage's columns by tensor cores (mma m16n8k16, the weights as the wide operand), and
the warps' sums are added up once an output. A program's memory leaves room for one of the next kernel, which fills its
own ring meanwhile: weights come from no earlier kernel. x, bias and the result wait for the previous kernel's end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kernels.hopper_dependent_launch import after_previous_kernel, let_next_kernel_start


@gluon.jit
def _along(DIM: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr):
    """0, 1, .. SIZE - 1 along one of three dimensions."""
    FIRST: gl.constexpr = 0 if DIM > 0 else 1
    SECOND: gl.constexpr = 2 if DIM < 2 else 1
    x = gl.arange(0, SIZE, layout=gl.SliceLayout(FIRST, gl.SliceLayout(SECOND, L)))
    return gl.expand_dims(gl.expand_dims(x, FIRST), SECOND)


@gluon.jit
def _fetch(
    dst, matrix, first_row, group, row_groups, rows, groups,
    HEIGHT: gl.constexpr, KW: gl.constexpr, KT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy a stage to dst [KW, HEIGHT, KT // KW]: columns from 8 * group on; zeros past row `rows` of the
    matrix and past its column 8 * groups."""
    CHUNKS: gl.constexpr = KT // KW // 8  # of 16 bytes, in a warp's part of a row
    SIDE: gl.constexpr = min(32 // CHUNKS, KW)  # parts that a warp's lanes have side by side: 512 bytes of a row
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [SIDE, 32 // CHUNKS // SIDE, CHUNKS], [1, WARPS, 1], [2, 0, 1])
    row = _along(1, HEIGHT, L)
    column = _along(0, KW, L) * (KT // KW) + _along(2, KT // KW, L)
    start = matrix + (first_row.to(gl.int64) * row_groups + group) * 8
    inside = (row < rows - first_row) & (_along(0, KW, L) * CHUNKS + _along(2, KT // KW, L) // 8 < groups - group)
    async_copy.async_copy_global_to_shared(dst, start + (row * (row_groups * 8) + column), inside, ".cg")


@gluon.jit
def _advance(row, group, groups, OUTS: gl.constexpr, KT: gl.constexpr):
    """The stage after this one: the next columns, or the first ones of the next outputs."""
    group += KT // 8
    if group >= groups:
        group = group * 0
        row += OUTS
    return row, group


@gluon.jit
def _store(Y, Bias, acc, row, last, rows, outs, OUTS: gl.constexpr, ROWS: gl.constexpr, BIAS: gl.constexpr):
    """The warps' sums acc [KW, OUTS, ROWS] of the outputs from `row` on to Y [rows, outs]."""
    L: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    n = row + gl.arange(0, OUTS, layout=gl.SliceLayout(1, L))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, L))
    y = gl.sum(acc, 0)
    if BIAS:
        y += gl.expand_dims(gl.load(Bias + n, mask=n < last, other=0.0).to(gl.float32), 1)
    at = gl.expand_dims(n, 1) + gl.expand_dims(r, 0).to(gl.int64) * outs
    inside = gl.expand_dims(n < last, 1) & gl.expand_dims(r < rows, 0)
    gl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["rows", "outs", "groups", "x_groups", "w_groups"])
def linear_rows_kernel(
    X, W, Bias, Y, rows, outs, groups, x_groups, w_groups,
    ROWS: gl.constexpr, OUTS: gl.constexpr, KT: gl.constexpr, KW: gl.constexpr, ST: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """ROWS: 8 or 16. OUTS outputs at a time, of ST stages of KT columns, which KW warps share.

    groups, x_groups, w_groups: x's columns, and the strides of x's and w's rows, divided by 8.
    """
    DTYPE: gl.constexpr = W.dtype.element_ty
    WARPS: gl.constexpr = KW * (OUTS // 16)
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [KW, OUTS // 16, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=M, k_width=2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=M, k_width=2)
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    w_s = gl.allocate_shared_memory(DTYPE, [ST, KW, OUTS, KT // KW], SWIZZLE)
    x_s = gl.allocate_shared_memory(DTYPE, [ST, KW, ROWS, KT // KW], SWIZZLE)
    let_next_kernel_start()
    tiles = (outs + 15) // 16
    row = gl.program_id(0) * tiles // gl.num_programs(0) * 16
    last = gl.minimum((gl.program_id(0) + 1) * tiles // gl.num_programs(0) * 16, outs)
    stages = (groups + KT // 8 - 1) // (KT // 8)  # of a tile
    first = gl.to_tensor(0)
    next_row, next_group = row, first  # what is fetched next
    for i in gl.static_range(ST - 1):
        _fetch(w_s.index(i), W, next_row, next_group, w_groups, last, groups, OUTS, KW, KT, WARPS)
        async_copy.commit_group()
        next_row, next_group = _advance(next_row, next_group, groups, OUTS, KT)
    after_previous_kernel()
    x_row, x_group = first, first
    for i in gl.static_range(ST - 1):
        _fetch(x_s.index(i), X, first, x_group, x_groups, rows, groups, ROWS, KW, KT, WARPS)
        async_copy.commit_group()
        x_row, x_group = _advance(x_row, x_group, groups, OUTS, KT)
    acc = gl.zeros([KW, OUTS, ROWS], gl.float32, layout=M)
    left = stages
    now, then = first, gl.to_tensor(ST - 1)
    for _i in range((last - row + OUTS - 1) // OUTS * stages):
        async_copy.wait_group(ST - 2)
        _fetch(w_s.index(then), W, next_row, next_group, w_groups, last, groups, OUTS, KW, KT, WARPS)
        _fetch(x_s.index(then), X, first, next_group, x_groups, rows, groups, ROWS, KW, KT, WARPS)
        async_copy.commit_group()
        next_row, next_group = _advance(next_row, next_group, groups, OUTS, KT)
        acc = mma_v2(w_s.index(now).load(A), x_s.index(now).permute((0, 2, 1)).load(B), acc)
        then = now
        now += 1
        if now == ST:
            now = now * 0
        left -= 1
        if left == 0:
            _store(Y, Bias, acc, row, last, rows, outs, OUTS, ROWS, BIAS)
            acc = gl.zeros([KW, OUTS, ROWS], gl.float32, layout=M)
            left = stages
            row += OUTS
