"""Products of one or two rows with a weight on Hopper: what `linear` runs there for the shapes it takes."""

import torch
from torch import Tensor

from kernels.hopper_linear_kernel import linear_kernel

# At four rows a thread's registers leave room for too few programs: 6.3 ms for a step that cuBLAS does in 3.9.
MAX_ROWS = 2
# Outputs of a program, and its warps: 2 KiB of w a warp on its way, and room for several programs a multiprocessor.
OUTS, WARPS = 4, 8


def why_not(rows: int, w: Tensor) -> str:
    """Why x of so many rows times w [out, in] is left to cuBLAS; empty where this product takes it."""
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} rows are not 1 to {MAX_ROWS}"
    if w.dtype not in (torch.bfloat16, torch.float16):
        return f"{w.dtype} is not a 16-bit type"
    if w.shape[1] % 8 or w.stride(0) % 8 or w.stride(1) != 1 or w.data_ptr() % 16:
        return "w's rows are not contiguous multiples of 16 bytes"
    return ""


def linear_hopper(x: Tensor, w: Tensor, bias: Tensor | None = None, *, overlap_previous: bool = False) -> Tensor:
    """x [.., in] @ w [out, in]^T + bias [out] -> [.., out], summed in float32, for at most 2 rows in all.

    `overlap_previous` starts fetching w while the previous kernel of the stream still runs (programmatic dependent
    launch); x, bias and the result wait for it. It asks that no kernel that may still run writes to w.
    """
    rows = x.reshape(-1, x.shape[-1])  # [rows, in]
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    check_linear(rows, w, bias)
    out = torch.empty(rows.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    arguments, constants = linear_arguments(rows, w, bias, out, overlap_previous)
    linear_kernel[(-(-w.shape[0] // OUTS),)](*arguments, **constants)
    return out.view(*x.shape[:-1], w.shape[0])


def check_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError naming the argument that `linear_hopper` cannot take."""
    if w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"w must be [out, {x.shape[1]}], not {list(w.shape)}")
    if w.dtype != x.dtype or w.device != x.device:
        raise ValueError(f"w is {w.dtype} on {w.device}, x {x.dtype} on {x.device}")
    if reason := why_not(x.shape[0], w):
        raise ValueError(f"x or w: {reason}")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {x.dtype} [{w.shape[0]}], not {bias.dtype} {list(bias.shape)}")


def linear_arguments(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, overlap_previous: bool
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `linear_kernel` is launched with; also what it is compiled with where there is no GPU."""
    rows, (outs, ins) = x.shape[0], w.shape
    arguments = (x, w, bias, out, rows, outs, ins // 8, x.stride(0) // 8, w.stride(0) // 8)
    constants: dict[str, object] = {
        "ROWS": rows, "OUTS": OUTS, "WARPS": WARPS, "BIAS": bias is not None,
        "num_warps": WARPS, "launch_pdl": overlap_previous,
    }  # fmt: skip
    return arguments, constants
