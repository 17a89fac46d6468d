# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, assignment"
"""The device side of `hopper_linear`: x [rows, in] @ w [out, in]^T for one or two rows, bound by reading w once.

A program takes a few outputs over all columns, its warps side by side, by plain multiplications. So nothing is added up
between programs: a round trip through a memory system that is kept full takes as long as reading 100 KiB. A warp reads
512 neighbouring bytes of a row of w at a time, straight into registers; with several programs on a multiprocessor there
is as much on its way as its bandwidth asks for. x comes a step ahead too, for the same reason.

Weights come from no earlier kernel. So the first step of w is fetched while the previous kernel of the stream still
runs, and x and the result wait for its end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_dependent_launch import after_previous_kernel, let_next_kernel_start


@gluon.jit
def _wide(pairs, DTYPE: gl.constexpr):
    """Both halves of 32 bits that hold two 16-bit floats, as float32."""
    if gl.bfloat16 == DTYPE:
        return (pairs << 16).to(gl.float32, bitcast=True), (pairs & -65536).to(gl.float32, bitcast=True)
    low, high = pairs.to(gl.int16), (pairs >> 16).to(gl.int16)
    return low.to(DTYPE, bitcast=True).to(gl.float32), high.to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def _read_w(at, i, groups):
    """The groups i of 8 columns; zeros past the last."""
    return gl.load(at + i * 4, mask=i < groups, other=0, eviction_policy="evict_first")


@gluon.jit
def _read_x(at, i, groups, rows, x_groups, ROWS: gl.constexpr):
    """The same of each row of x; zeros past the last."""
    x = (gl.load(at + i * 4, mask=i < groups, other=0),)
    for row in gl.static_range(1, ROWS):
        x += (gl.load(at + (row * x_groups + i) * 4, mask=(i < groups) & (row < rows), other=0),)
    return x


@gluon.jit
def _add_products(acc, w, x, DTYPE: gl.constexpr):
    """acc [outputs, groups] of each row of x + w x over the columns of the groups."""
    w0, w1 = _wide(w, DTYPE)
    sums = ()
    for row in gl.static_range(len(acc)):
        x0, x1 = _wide(x[row], DTYPE)
        sums += (acc[row] + gl.sum(w0 * x0 + w1 * x1, 2),)
    return sums


@gluon.jit(do_not_specialize=["rows", "outs", "groups", "x_groups", "w_groups"])
def linear_kernel(
    X, W, Bias, Y, rows, outs, groups, x_groups, w_groups,
    ROWS: gl.constexpr, OUTS: gl.constexpr, WARPS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """OUTS outputs a program, of at most ROWS rows; a step is 256 columns a warp, and one is on its way.

    groups, x_groups, w_groups: x's columns, and the strides of x's and w's rows, divided by 8.
    """
    DTYPE: gl.constexpr = W.dtype.element_ty
    STEP: gl.constexpr = 32 * WARPS  # groups, one a thread
    # [outputs, groups, pairs]: a thread's 8 columns of a row are one load, and are added up within the thread.
    L: gl.constexpr = gl.BlockedLayout([OUTS, 1, 4], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    let_next_kernel_start()
    n = gl.program_id(0) * OUTS + gl.arange(0, OUTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    i = gl.arange(0, STEP, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    pair = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    i = gl.expand_dims(gl.expand_dims(i, 0), 2)
    pair = gl.expand_dims(gl.expand_dims(pair, 0), 1)
    out = gl.expand_dims(gl.expand_dims(gl.minimum(n, outs - 1), 1), 2).to(gl.int64)
    w_at = W.to(gl.pointer_type(gl.int32), bitcast=True) + out * (w_groups * 4) + pair
    x_at = X.to(gl.pointer_type(gl.int32), bitcast=True) + pair
    w = _read_w(w_at, i, groups)
    after_previous_kernel()
    x = _read_x(x_at, i, groups, rows, x_groups, ROWS)
    acc = (gl.zeros([OUTS, STEP], gl.float32, layout=gl.SliceLayout(2, L)),) * ROWS
    for start in range(STEP, groups + STEP, STEP):
        acc = _add_products(acc, w, x, DTYPE)
        w = _read_w(w_at, i + start, groups)
        x = _read_x(x_at, i + start, groups, rows, x_groups, ROWS)
    bias = gl.zeros([OUTS], gl.float32, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    if BIAS:
        bias = gl.load(Bias + n, mask=n < outs, other=0.0).to(gl.float32)
    for row in gl.static_range(ROWS):
        y = gl.sum(acc[row], 1) + bias
        gl.store(Y + row * outs + n, y.to(Y.dtype.element_ty), mask=(n < outs) & (row < rows))
