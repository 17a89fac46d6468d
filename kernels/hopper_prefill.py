"""FlashAttention forward over paged KV for Hopper: what `prefill_attention` runs there for the shapes it takes."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan
from kernels.hopper_pool import SWIZZLE, check_pool
from kernels.hopper_prefill_kernel import prefill_kernel
from kernels.hopper_tiles import PrefillTiles
from kernels.triton_kernel import next_power_of_2

LOG2_E = 1.4426950408889634
LONG_KEYS = 1500  # measured, TFLOP/s of two and three groups at 1,024 mean keys: 412, 396; at 2,048: 426, 441


def _store_layout(wide: int, lane_rows: int) -> gl.DistributedLinearLayout:
    """16-byte pieces a lane, a warp's lanes side by side on so many rows; a warp keeps its rows of the accumulator."""
    columns = [1 << i for i in range(3, wide.bit_length() - 1)]
    rows = [1 << i for i in range(4)]
    across, apart = 6 - lane_rows.bit_length(), lane_rows.bit_length() - 1  # bits of a lane's number: columns, rows
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *([0, c] for c in columns[across:]), *([r, 0] for r in rows[apart:])],
        [*([0, c] for c in columns[:across]), *([r, 0] for r in rows[:apart])],
        [[16, 0], [32, 0]],
        [],
        [64, wide],
    )


def why_not(head_dim: int, page_size: int, dtype: torch.dtype) -> str:
    """Why this shape needs the plain kernel; empty where this one takes it."""
    if head_dim not in (64, 96, 128, 256):
        return f"head_dim {head_dim} is not 64, 96, 128 or 256"
    if page_size not in (16, 64, 128):
        return f"page_size {page_size} is not 16, 64 or 128"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not a 16-bit type"
    return ""


def prefill_attention_hopper(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """As `prefill_attention_triton`, for the shapes that `why_not` names nothing against."""
    check_options(window, soft_cap)
    check_prefill(q, cache, layer, plan, lse)
    heads, kv_heads, d = q.shape[1], cache.shape[3], q.shape[2]
    tiles = plan.once(
        ("hopper prefill", heads, kv_heads, d, window),
        lambda: PrefillTiles.of(plan, heads, kv_heads, groups_for(plan, d, window), keys_for(d), window),
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments, constants = prefill_arguments(q, cache, layer, plan.page_table, tiles, out, lse, window, soft_cap)
    prefill_kernel[(tiles.counts.shape[0],)](*arguments, **constants)
    return out


def keys_for(head_dim: int) -> int:
    """How many keys a step takes: what two stages of K and V leave of shared memory holds Q."""
    return 64 if head_dim == 256 else 128


def groups_for(plan: AttentionPlan, head_dim: int, window: int) -> int:
    """How many groups of 64 query rows a tile has; three pay at head_dim 64 once a query sees some 1,500 keys."""
    spans = list(zip(plan.queries, plan.contexts, strict=True))[plan.num_decodes :]
    pairs = sum(rows * min(context - rows // 2, window or context) for rows, context in spans)
    return 3 if head_dim == 64 and pairs >= LONG_KEYS * sum(rows for rows, _ in spans) else 2


def check_prefill(q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, lse: Tensor | None) -> None:
    """Raises ValueError naming the argument that `prefill_attention_hopper` cannot take."""
    plan.check(q, cache, layer, plan.num_tokens - plan.decode_tokens)
    check_pool(q, cache, layer)
    if reason := why_not(q.shape[2], plan.page_size, q.dtype):
        raise ValueError(f"cache: {reason}")
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:2])}")


def prefill_arguments(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    tiles: PrefillTiles,
    out: Tensor,
    lse: Tensor | None,
    window: int,
    soft_cap: float,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `prefill_kernel` is launched with; also what it is compiled with where there is no GPU."""
    _, layers, _, kv_heads, page_size, d = cache.shape
    tokens, heads, _ = q.shape
    rows = kv_heads * page_size  # of a layer's K, and of its V
    wide = next_power_of_2(d)
    queries = TensorDescriptor(q, [tokens, heads * d], [q.stride(0), 1], [64, wide], SWIZZLE)
    pool = TensorDescriptor(cache, [cache.numel() // d, d], [d, 1], [min(page_size, tiles.keys), 64], SWIZZLE)
    arguments = (
        queries, pool, out, lse, page_table, tiles.records, tiles.counts, tiles.records.shape[1],
        (soft_cap or d**-0.5) * LOG2_E, layer * 2 * rows, layers * 2 * rows,
    )  # fmt: skip
    two = tiles.groups == 2
    # Whole rows, but where an option leaves no register for their addresses: pieces of 64 bytes need fewer.
    lane_rows = 8 if window or soft_cap else 256 // wide
    constants: dict[str, object] = {
        "GROUPS": tiles.groups, "HEADS": heads, "KV_HEADS": kv_heads, "HD": d, "WIDE": wide, "KEYS": tiles.keys,
        "PAGE": page_size, "ST": 2 if two else 4, "QB": 2 if two and d < 256 else 1,
        "STORE_L": _store_layout(wide, lane_rows), "LANE_ROWS": lane_rows, "WITH_LSE": lse is not None,
        "WINDOW": window, "SOFT_CAP": float(soft_cap),
        "num_warps": 4, "maxnreg": 168 if two else 128,
    }  # fmt: skip
    return arguments, constants
