# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="operator, union-attr"
"""What a computing group of `hopper_prefill_kernel` does with one block of keys, and the barriers it tells of it.

The computing groups tell the fetching warp that a buffer is free through named barriers: Triton's mbarrier.arrive
brings a barrier of the whole group with it, four of them a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Named barriers, of the 16 that a program has; Triton numbers its own from 0 and uses five here at most.
TAIL = gl.constexpr(5)  # the groups cleared V's rows past the sequence
Q_FREE = gl.constexpr(6)  # + Q buffer
K_FREE = gl.constexpr(8)  # + stage
V_FREE = gl.constexpr(12)  # + stage


@gluon.jit
def bar_sync(barrier, THREADS: gl.constexpr):
    x = gl.to_tensor(barrier)
    n = gl.to_tensor(THREADS)
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [x, n], gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive(barrier, THREADS: gl.constexpr):
    x = gl.to_tensor(barrier)
    n = gl.to_tensor(THREADS)
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [x, n], gl.int32, is_pure=False, pack=1)


@gluon.jit
def lane_sums(p, KEYS: gl.constexpr):
    """Row sums of p [64, KEYS], one partial sum a lane, [64, 4]: the loop needs no shuffle for them."""
    return gl.sum(gl.sum(gl.reshape(p, (64, KEYS // 8, 4, 2)), 3), 1)


@gluon.jit
def cap(s, HD: gl.constexpr, SOFT_CAP: gl.constexpr):
    """tanh(s / sqrt(HD) / SOFT_CAP), good to 11 bits: more than a score has that was rounded to 16 bits on its way."""
    if SOFT_CAP > 0.0:
        x = s * (1.0 / (SOFT_CAP * HD**0.5))
        s = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
    return s


@gluon.constexpr_function
def _only(dim, layout):
    """The layout of one dimension's indices."""
    for other in reversed(range(6)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def along(DIM: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr):
    """0, 1, .. SIZE - 1 along one of six dimensions. A tensor taken apart into what registers, lanes and warps number
    has its rows and columns known at compile time but for a term a thread: they need no registers of their own."""
    x = gl.arange(0, SIZE, layout=_only(DIM, L))
    for other in gl.static_range(6):
        if other != DIM:
            x = gl.expand_dims(x, other)
    return x


@gluon.jit
def mask(s, sees, KEYS: gl.constexpr, WINDOW: gl.constexpr):
    """s [64, KEYS] without the keys that a row does not see; its first row sees none later than its `sees`th.

    -2^100: times the scale it is exact, so that a row with nothing but masked keys gives exp2(0).
    """
    parts = gl.reshape(s, (4, 2, 8, KEYS // 8, 4, 2))
    L: gl.constexpr = parts.type.layout
    # Through a move that the compiler does not look into: else it keeps a sum in a register for each place that masks.
    x = gl.to_tensor(sees)
    sees = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=True, pack=1)
    last = 16 * along(0, 4, L) + along(2, 8, L) - 2 * along(4, 4, L) + sees
    column = 8 * along(3, KEYS // 8, L) + along(5, 2, L) - 8 * along(1, 2, L)
    seen = column <= last
    if WINDOW:
        seen = seen & (column > last - WINDOW)
    masked = gl.reshape(gl.where(seen, parts, -1.2676506002282294e30), (64, KEYS))
    return gl.convert_layout(masked, s.type.layout, assert_trivial=True)


@gluon.jit
def _softmax(s, m, total, scale, KEYS: gl.constexpr, WINDOW: gl.constexpr):
    """The maximum that scores are taken from stays until a score is 2^8 times over it: sums have room for that, and acc
    is seldom rescaled (FlashAttention-4's conditional rescaling). Windows take part in neither, see `_rescale`."""
    top = gl.max(s, 1)
    new = gl.maximum(m, top) if WINDOW else gl.where((top - m) * scale > 8.0, top, m)
    old = gl.exp2((m - new) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(new * scale, 1))
    kept = gl.convert_layout(old, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    total = total * gl.expand_dims(kept, 1) + lane_sums(p, KEYS)
    return p, old, new, total


def _rescale_asm(n: int) -> str:
    """$0..: n elements of a thread times their factors, passed over where no flag of any lane of the warp is set."""
    lines = [f"{{ .reg .pred some; .reg .b32 flags; mov.b32 flags, ${3 * n};"]
    lines += [f"or.b32 flags, flags, ${3 * n + i};" for i in range(1, n)]
    lines += ["setp.ne.s32 some, flags, 0; vote.sync.any.pred some, some, 0xffffffff;"]
    lines += [f"mov.b32 ${i}, ${n + i};" for i in range(n)]
    lines += ["@!some bra DONE;", *(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)), "DONE: }"]
    return " ".join(lines)


_RESCALE = gl.constexpr(_rescale_asm(32))
_RESCALE_OPERANDS = gl.constexpr("=&f," * 32 + "f," * 64 + "r," * 31 + "r")


@gluon.jit
def _rescale(acc, old, WINDOW: gl.constexpr, O_L: gl.constexpr):
    """acc * old, row by row; a warp that has nothing to change passes over it.

    A branch of a warp needs PTX: in Triton all warps would have to agree, at a barrier. Every element comes with its
    factor and with a flag that is set wherever the factor is not one, so which elements PTX is given together makes no
    difference. Windows are computed without it: their kernel would be a register short, and has fewer steps.
    """
    factor = gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, O_L)), 1)
    if WINDOW:
        acc = acc * factor
    else:
        # One flag for the two rows that a thread has: the compiler sees that 32 flags are the same register.
        flag = gl.max(gl.reshape((old != 1.0).to(gl.int32), (4, 2, 8)), 1)
        flag, _ = gl.broadcast(gl.expand_dims(flag, 1), gl.reshape(old, (4, 2, 8)))
        flag = gl.expand_dims(gl.convert_layout(gl.reshape(flag, (64,)), gl.SliceLayout(1, O_L)), 1)
        flag, _ = gl.broadcast(flag, acc)
        factor, _ = gl.broadcast(factor, acc)
        arguments = [acc, factor, flag]
        acc = gl.inline_asm_elementwise(_RESCALE, _RESCALE_OPERANDS, arguments, gl.float32, is_pure=True, pack=32)
    return acc


@gluon.jit
def overlapped_step(
    acc, m, total, p, it, block, q, k_s, v_s, k_full, v_full, sees, scale,
    ST: gl.constexpr, GROUPS: gl.constexpr, MASK: gl.constexpr,
    HD: gl.constexpr, KEYS: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """S of this block and P V of the one before. p crosses the loop as float32 (bf16 would be taken apart and packed
    again) and is rounded before S is begun: three groups have no registers for both. The wait for V, a branch, keeps
    the compiler from moving the wait for P V above the exponentials."""
    ks, phase = it % ST, (it // ST) & 1
    vs = (it - 1) % ST
    weights = gl.convert_layout(p.to(q.dtype), P_L)
    mbarrier.wait(k_full.index(ks), phase)
    zero = gl.zeros([64, KEYS], gl.float32, layout=S_L)
    s = warpgroup_mma(q, k_s.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, v_s.index(vs), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    bar_arrive(K_FREE + ks, 128 * GROUPS + 32)
    s = cap(s, HD, SOFT_CAP)
    if MASK:
        s = mask(s, sees - block * KEYS, KEYS, WINDOW)
    p, old, m, total = _softmax(s, m, total, scale, KEYS, WINDOW)
    mbarrier.wait(v_full.index(ks), phase)
    acc, p, total = warpgroup_mma_wait(0, deps=[acc, p, total])
    bar_arrive(V_FREE + vs, 128 * GROUPS + 32)
    acc = _rescale(acc, old, WINDOW, O_L)
    return acc, m, total, p


@gluon.jit
def plain_step(
    acc, m, total, it, block, q, k_s, v_s, k_full, v_full, sees, scale,
    ST: gl.constexpr, GROUPS: gl.constexpr, MASK: gl.constexpr,
    HD: gl.constexpr, KEYS: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """S, softmax and P V of one block, one after another: what three groups do where there is a window."""
    st, phase = it % ST, (it // ST) & 1
    mbarrier.wait(k_full.index(st), phase)
    zero = gl.zeros([64, KEYS], gl.float32, layout=S_L)
    s = warpgroup_mma(q, k_s.index(st).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    bar_arrive(K_FREE + st, 128 * GROUPS + 32)
    s = cap(s, HD, SOFT_CAP)
    if MASK:
        s = mask(s, sees - block * KEYS, KEYS, WINDOW)
    p, old, m, total = _softmax(s, m, total, scale, KEYS, WINDOW)
    acc = _rescale(acc, old, WINDOW, O_L)
    weights = gl.convert_layout(p.to(q.dtype), P_L)
    mbarrier.wait(v_full.index(st), phase)
    acc = warpgroup_mma(weights, v_s.index(st), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    bar_arrive(V_FREE + st, 128 * GROUPS + 32)
    return acc, m, total


@gluon.jit
def clear_tail(v, keys, GROUP: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr, KEYS: gl.constexpr):
    """Zero V's rows past a sequence's end, half by each of two groups: 0 * NaN of earlier use would be NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDE, WIDE // 8], [4, 1], [1, 0])
    HALF: gl.constexpr = KEYS // 2
    PASS: gl.constexpr = 4 * 32 * 8 // WIDE  # rows that the threads hold side by side
    if GROUP < 2:
        half = v.slice(GROUP * HALF, HALF, dim=0)
        parts = gl.reshape(half.load(L), (HALF // PASS, PASS, WIDE, 1, 1, 1))
        P: gl.constexpr = parts.type.layout
        inside = PASS * along(0, HALF // PASS, P) < keys - GROUP * HALF - along(1, PASS, P)
        x = gl.reshape(gl.where(inside, parts, gl.full(parts.shape, 0.0, parts.dtype, layout=P)), (HALF, WIDE))
        half.store(gl.convert_layout(x, L, assert_trivial=True))
        fence_async_shared()
    bar_sync(TAIL, 128 * GROUPS)


@gluon.jit
def store_rows(
    Out, out, first_row, rows, column,
    TOKEN: gl.constexpr, HD: gl.constexpr, WIDE: gl.constexpr, LANE_ROWS: gl.constexpr,
):  # fmt: skip
    """The first rows of out [64, WIDE], a warp's lanes side by side on LANE_ROWS of them, to Out [tokens, TOKEN] from a
    row and column on."""
    parts = gl.reshape(out, (4, 16 // LANE_ROWS, LANE_ROWS, WIDE, 1, 1))
    L: gl.constexpr = parts.type.layout
    row = 16 * along(0, 4, L) + along(2, LANE_ROWS, L)
    apart = LANE_ROWS * along(1, 16 // LANE_ROWS, L)
    col = along(3, WIDE, L)
    inside = apart < rows - row
    if HD < WIDE:
        inside = inside & (col < HD)
    at = (first_row + row).to(gl.int64) * TOKEN + column + col
    gl.store(Out + at + apart * TOKEN, parts, mask=inside)


@gluon.jit
def store_lse(Lse, lse, first_row, rows, head, HEADS: gl.constexpr):
    """The first rows of lse [64] to a head's column of Lse [tokens, HEADS], from a row on."""
    parts = gl.reshape(lse, (4, 2, 8, 1, 1, 1))
    L: gl.constexpr = parts.type.layout
    row = 16 * along(0, 4, L) + along(2, 8, L)
    apart = 8 * along(1, 2, L)
    at = (first_row + row).to(gl.int64) * HEADS + head
    gl.store(Lse + at + apart * HEADS, parts, mask=apart < rows - row)
