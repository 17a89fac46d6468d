"""Attention of one query per sequence over paged KV: flash decoding (Dao et al. 2023), split-KV on the GPU."""

from __future__ import annotations

import warnings
from functools import cache as run_once
from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.capability import has_hopper_decode
from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


def decode_attention(q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, lse: Tensor | None = None) -> Tensor:
    """The first `plan.num_decodes` sequences' queries, q [seqs, heads, d] -> [seqs, heads, d] in q's dtype.

    cache [pages, layers, 2, kv_heads, page_size, d]. `lse` [seqs, heads] float32, where it is given, receives the
    log of each softmax's sum of exponentials: what merging with another part of the context needs.
    """
    plan.check(q, cache, layer, plan.num_decodes)
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:2])}")
    if has_hopper_decode(q, cache):
        from kernels.hopper_decode import decode_attention_hopper

        return decode_attention_hopper(q, cache, layer, plan, lse)
    if q.is_cuda:
        return decode_attention_triton(q, cache, layer, plan, lse)
    return decode_attention_torch(q, cache, layer, plan, lse)


def decode_attention_torch(
    q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, lse: Tensor | None = None
) -> Tensor:
    """The twin of `decode_attention_triton`, and the CPU backend: scores and sums straight from the pages.

    Two calls read the pool by row numbers, without a copy of K or V: `sampled_addmm` computes the dot products at
    given places of q @ K^T, `embedding_bag` adds weighted rows of V. One AVX2 core, 30 layers of 9/3 heads of 64,
    float32, ms a step against a gather and one SDPA a sequence: 1 x 600 tokens 4.0 (6.7), 8 sequences of 100-600
    16 (51), 32 of 100-600 57 (194); pages as splits with a merge were slower than either (15, 60, 361).
    """
    seqs, heads, d = q.shape
    scores = plan.once(("scores", heads, cache.shape, cache.dtype), lambda: _Scores(plan, cache, heads))
    k, v = scores.keys_and_values(cache, layer)
    torch.sparse.sampled_addmm(
        scores.sparse, q.reshape(-1, d).float(), k.t(), beta=0.0, alpha=d**-0.5, out=scores.sparse
    )
    for i, row in enumerate(scores.by_sequence):  # ragged: one short call a sequence beat padding
        if lse is not None:
            torch.logsumexp(row, -1, out=lse[i])
        torch.softmax(row, -1, out=row)
    out = torch.embedding_bag(v, scores.rows, scores.bags, False, 0, False, scores.values)[0]  # 0: sum
    return out.view(seqs, heads, d).to(q.dtype)


class _Scores:
    """Where the step's scores lie: ragged [seqs, heads, context], as the values of one sparse matrix.

    Its columns are rows of the pool seen as [rows, d], counted from the layer's first, so that one set of numbers
    serves K and V of every layer.
    """

    def __init__(self, plan: AttentionPlan, cache: Tensor, heads: int) -> None:
        _, layers, _, kv_heads, page_size, _ = cache.shape
        contexts, pages = plan.contexts[: plan.num_decodes], plan.pages()[: plan.num_decodes]
        pool_pages = cache.shape[0]
        self._widened = None
        if cache.dtype != torch.float32:
            self._widened = _Widened(torch.cat(pages), cache)
            pages = list(torch.split(torch.arange(len(self._widened.pages)), [len(p) for p in pages]))
            pool_pages, layers = len(self._widened.pages), 1
        self._half = kv_heads * page_size  # rows from a layer's K to its V
        head_rows = torch.arange(0, self._half, page_size).view(kv_heads, 1, 1)
        tile = head_rows + torch.arange(page_size)  # [kv_heads, 1, page_size]
        group = heads // kv_heads
        rows = [
            (p.view(1, -1, 1) * (layers * 2 * self._half) + tile)
            .view(kv_heads, 1, -1)[:, :, :context]
            .expand(kv_heads, group, context)
            .reshape(-1)
            for p, context in zip(pages, contexts, strict=True)
        ]
        self.rows = torch.cat(rows)
        ends = torch.tensor(contexts).repeat_interleave(heads).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
        self.bags = starts[:-1]
        self._span = (pool_pages * layers * 2 - (2 * layers - 1)) * self._half
        _quiet_sparse()
        self.sparse = torch.sparse_csr_tensor(
            starts,
            self.rows,
            torch.zeros(len(self.rows)),
            size=(len(ends), self._span),
            check_invariants=False,
        )
        self.values = self.sparse.values()
        self.by_sequence = [
            part.view(heads, -1) for part in torch.split(self.values, [context * heads for context in contexts])
        ]

    def keys_and_values(self, cache: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer as [rows, d] float32, from their first row on."""
        if self._widened is not None:
            cache, layer = self._widened.read(cache, layer), 0
        d = cache.shape[-1]
        k_start = cache.storage_offset() + layer * 2 * self._half * d
        size, stride = (self._span, d), (d, 1)
        return cache.as_strided(size, stride, k_start), cache.as_strided(size, stride, k_start + self._half * d)


class _Widened:
    """Half-width pages of one layer as a float32 pool of their own, in the order of the plan."""

    def __init__(self, pages: Tensor, cache: Tensor) -> None:
        self.pages = pages
        # Kept for all layers: fresh memory of this size would be mapped anew each time, at three times the cost.
        self._half = cache.new_empty(len(pages), cache[0, 0].numel())
        self._full = torch.empty(self._half.shape)

    def read(self, cache: Tensor, layer: int) -> Tensor:
        """[rows, d] float32, valid until the next call."""
        pool = cache.view(-1, self._half.shape[1])  # [pages * layers, elements of a page's layer]
        torch.index_select(pool, 0, self.pages * cache.shape[1] + layer, out=self._half)
        return self._full.copy_(self._half).view(-1, cache.shape[5])


@run_once
def _quiet_sparse() -> None:
    """Sparse CSR says once a process that it is in beta; the only operation used here is a plain gathered product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))


def decode_attention_triton(
    q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, lse: Tensor | None = None
) -> Tensor:
    """Split-KV: programs for (sequence, KV head, part of the context) and a merge by log-sum-exp.

    A KV head's query heads share a program, so that K and V are read once a group.
    """
    _, layers, _, kv_heads, page_size, d = cache.shape
    seqs, heads, _ = q.shape
    if q.stride(2) != 1:
        raise ValueError("q must be contiguous in its last dimension")
    widest = -(-max(plan.contexts[:seqs]) // page_size)  # pages
    split_pages = -(-widest // split_count(seqs * kv_heads, widest, q.device))
    splits = -(-widest // split_pages)
    parts = q.new_empty(seqs, heads, splits, d, dtype=torch.float32)
    part_lse = q.new_empty(seqs, heads, splits, dtype=torch.float32)
    page_elements = layers * 2 * kv_heads * page_size * d
    block_d = next_power_of_2(d)
    _decode_split[(seqs, kv_heads, splits)](
        q,
        cache,
        plan.page_table,
        plan.context_lens,
        parts,
        part_lse,
        q.stride(0),
        q.stride(1),
        plan.page_table.stride(0),
        page_elements,
        layer * 2 * kv_heads * page_size * d,
        splits,
        split_pages * page_size,
        d**-0.5 * _LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=d,
        PAGE_SIZE=page_size,
        BLOCK_G=max(16, next_power_of_2(heads // kv_heads)),
        BLOCK_D=block_d,
        BLOCK_N=min(page_size, 64 if d * cache.element_size() <= 512 else 32),
        num_warps=4,
        num_stages=2,
    )
    out = q.new_empty(seqs, heads, d)
    _decode_merge[(seqs, heads)](
        parts,
        part_lse,
        plan.context_lens,
        out,
        out if lse is None else lse,
        splits,
        split_pages * page_size,
        HEAD_DIM=d,
        BLOCK_D=block_d,
        WITH_LSE=lse is not None,
        num_warps=1,
    )
    return out


def split_count(programs: int, pages: int, device: torch.device) -> int:
    """Parts of the longest context: enough to give every multiprocessor two programs, one page each at least."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(pages, 2 * cores // programs))


_LOG2_E = 1.4426950408889634  # the kernels exponentiate to base 2


@TritonKernel
@no_type_check
def _decode_split(
    q_ptr,
    cache_ptr,
    page_table_ptr,
    context_lens_ptr,
    parts_ptr,
    part_lse_ptr,
    q_seq_stride,
    q_head_stride,
    page_table_stride,
    page_stride,
    layer_offset,
    splits,
    split_tokens,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, tl.load(context_lens_ptr + seq))
    if begin >= end:
        return
    g = tl.arange(0, BLOCK_G)
    i = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    q_mask = (g < GROUP)[:, None] & (i < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + seq * q_seq_stride + head[:, None] * q_head_stride + i[None, :], mask=q_mask, other=0.0)
    q = q.to(cache_ptr.dtype.element_ty)
    k_base = cache_ptr + layer_offset + kv_head * PAGE_SIZE * HEAD_DIM
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        page = tl.load(page_table_ptr + seq * page_table_stride + start // PAGE_SIZE).to(tl.int64)
        # Rows past the context are never loaded: they may hold NaN of an earlier owner.
        inside = start + n < end
        k_ptr = k_base + page * page_stride + (start % PAGE_SIZE) * HEAD_DIM
        tile = n[:, None] * HEAD_DIM + i[None, :]
        kv_mask = inside[:, None] & (i < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + tile, mask=kv_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(k_ptr + KV_HEADS * PAGE_SIZE * HEAD_DIM + tile, mask=kv_mask, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        total = total * shrink + tl.sum(p, axis=1)
        top = new_top
    part = (seq * (KV_HEADS * GROUP) + head) * splits + split
    tl.store(parts_ptr + part[:, None] * HEAD_DIM + i[None, :], acc / total[:, None], mask=q_mask)
    tl.store(part_lse_ptr + part, top + tl.log2(total), mask=g < GROUP)


@TritonKernel
@no_type_check
def _decode_merge(
    parts_ptr,
    part_lse_ptr,
    context_lens_ptr,
    out_ptr,
    lse_ptr,
    splits,
    split_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    row = seq * tl.num_programs(1) + tl.program_id(1)
    used = tl.cdiv(tl.load(context_lens_ptr + seq), split_tokens)
    i = tl.arange(0, BLOCK_D)
    top = tl.load(part_lse_ptr + row * splits)
    total = 1.0
    acc = tl.load(parts_ptr + row * splits * HEAD_DIM + i, mask=i < HEAD_DIM, other=0.0)
    for split in range(1, used):
        part = row * splits + split
        lse = tl.load(part_lse_ptr + part)
        new_top = tl.maximum(top, lse)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        acc = acc * shrink + weight * tl.load(parts_ptr + part * HEAD_DIM + i, mask=i < HEAD_DIM, other=0.0)
        total = total * shrink + weight
        top = new_top
    tl.store(out_ptr + row * HEAD_DIM + i, acc / total, mask=i < HEAD_DIM)
    if WITH_LSE:
        tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)
