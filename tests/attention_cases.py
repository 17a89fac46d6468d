"""Random paged attention problems and their answers by plain arithmetic, for the kernels' tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan


@dataclass
class Case:
    q: Tensor  # [tokens, heads, d]
    cache: Tensor  # [pages, layers, 2, kv_heads, page_size, d]
    plan: AttentionPlan
    layer: int


def make_case(
    queries: list[int],
    contexts: list[int],
    *,
    heads: int = 8,
    kv_heads: int = 2,
    d: int = 128,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_decodes: int = 0,
    decode_queries: int = 1,
    batch_invariant: bool = False,
    prefix: int = 0,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cuda",
) -> Case:
    """Shuffled pages; whatever no token lies in is NaN, and unused slots of the table hold numbers of no page.

    The first `prefix` tokens, a multiple of the page size, are the same for all sequences.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    used = [-(-n // page_size) for n in contexts]
    pages = sum(used) + 3
    cache = torch.randn(pages, 2, 2, kv_heads, page_size, d, device=device, dtype=dtype, generator=g)
    order = torch.randperm(pages, device=device, generator=g).to(torch.int32)
    table = torch.full((len(contexts), max(used) + 2), 2**31 - 1, dtype=torch.int32, device=device)
    table[:, 1::2] = -7
    at = 0
    for row, (n, context) in enumerate(zip(used, contexts, strict=True)):
        table[row, :n] = order[at : at + n]
        at += n
        table[row, : prefix // page_size] = table[0, : prefix // page_size]
        if context % page_size:
            cache[table[row, n - 1].long(), :, :, :, context % page_size :] = float("nan")
    cache[order[at:].long()] = float("nan")
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32).to(device)
    q = torch.randn(sum(queries), heads, d, device=device, dtype=dtype, generator=g) * scale
    lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    plan = AttentionPlan(
        table, starts, lens, num_decodes, page_size, decode_queries=decode_queries, batch_invariant=batch_invariant
    )
    return Case(q, cache, plan, layer=1)


def dense_kv(case: Case, seq: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence, each [heads, context, d], in the pool's dtype."""
    context, page_size = case.plan.contexts[seq], case.plan.page_size
    pages = case.plan.page_table[seq, : -(-context // page_size)].long()
    kv = case.cache[pages, case.layer]  # [pages, 2, kv_heads, page_size, d]
    kv = kv.permute(1, 2, 0, 3, 4).reshape(2, kv.shape[2], -1, kv.shape[4])[:, :, :context]
    k, v = kv.repeat_interleave(case.q.shape[1] // kv.shape[1], 1)
    return k, v


def attend(case: Case, dtype: torch.dtype, window: int = 0, soft_cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, d], lse [tokens, heads]) with every product and the softmax in `dtype`."""
    out = torch.empty(case.q.shape, dtype=dtype, device=case.q.device)
    lse = torch.empty(case.q.shape[:2], dtype=dtype, device=case.q.device)
    plan, d = case.plan, case.q.shape[2]
    for seq, (rows, context) in enumerate(zip(plan.queries, plan.contexts, strict=True)):
        span = slice(plan.starts[seq], plan.starts[seq + 1])
        k, v = (t.to(dtype) for t in dense_kv(case, seq))
        s = case.q[span].transpose(0, 1).to(dtype) @ k.transpose(1, 2) * d**-0.5  # [heads, rows, context]
        if soft_cap:
            s = soft_cap * torch.tanh(s / soft_cap)
        key = torch.arange(context, device=s.device)
        last = key[context - rows :, None]
        s.masked_fill_((key > last) | (key <= last - (window or context)), float("-inf"))
        out[span] = (s.softmax(-1) @ v).transpose(0, 1)
        lse[span] = s.logsumexp(-1).transpose(0, 1)
    return out, lse


def error(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the reference's; NaN counts as infinite."""
    ratio = (out.double() - reference.double()).norm() / reference.double().norm()
    return float(ratio) if torch.isfinite(ratio) else float("inf")


def assert_close(case: Case, out: Tensor, lse: Tensor | None, window: int = 0, soft_cap: float = 0.0) -> None:
    """As good as attention by plain operations of the same type, within a factor of two."""
    reference, reference_lse = attend(case, torch.float32, window, soft_cap)
    plain, _ = attend(case, case.q.dtype, window, soft_cap)
    assert error(out, reference) <= 2 * error(plain, reference) + 1e-6
    if lse is not None:
        assert torch.allclose(lse, reference_lse, atol=2e-3, rtol=1e-3)
