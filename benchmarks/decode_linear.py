"""A decode step besides attention, on one Hopper GPU, beside cuBLAS and torch's own operations; medians, as JSON.

    python -m benchmarks.decode_linear --out FILE

The matrix products of a Llama-3-8B-shaped step (32 layers with weights of their own and the LM head: 15.0 GB) in one
CUDA graph, as a share of what a plain kernel reads in the same run; the small kernels in graphs of their own; and both
together. Graphs take turns, see `attention_kernels`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_kernels import Call, Json, device_row, medians, read_ceiling, relative_error
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.page_write import page_write
from kernels.qkv_to_pages import qkv_to_pages
from kernels.rms_norm import rms_norm_residual, rms_norm_triton
from kernels.rope import rope, rope_tables
from kernels.silu_mul import silu_mul

LAYERS, HIDDEN, HEADS, KV_HEADS, D, FFN, VOCAB, PAGE = 32, 4096, 32, 8, 128, 14336, 128256, 64
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * D, HIDDEN),
    "o": (HIDDEN, HEADS * D),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
    "lm_head": (VOCAB, HIDDEN),
}
# [out, in] of the products of SmolLM2-135M and Qwen2.5-7B, which no tile meets evenly, and their layers.
OTHERS = {
    "SmolLM2-135M": (30, [(960, 576), (576, 576), (3072, 576), (576, 1536)], (49152, 576)),
    "Qwen2.5-7B": (28, [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)], (152064, 3584)),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
EPS = 1e-5

Product = Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)


def make_weights() -> dict[str, list[Tensor]]:
    """One of each for every layer."""
    return {
        name: [normal(*shape, scale=shape[1] ** -0.5) for _ in range(1 if name == "lm_head" else LAYERS)]
        for name, shape in SHAPES.items()
    }


def overlapped(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, w, overlap_previous=True)


PRODUCTS: dict[str, Product] = {"ours": overlapped, "ours_in_turn": linear, "cublas": F.linear}


def products_row(batch: int, weights: dict[str, list[Tensor]], ceiling: float) -> Json:
    """Milliseconds of all products in one graph, each reading what the one before it wrote."""
    x = normal(batch, HIDDEN)

    def step(product: Product) -> Tensor:
        h = x
        for qkv, o, gate_up, down in zip(*(weights[name] for name in list(SHAPES)[:4]), strict=True):
            attended = product(product(h, qkv)[:, :HIDDEN], o)
            h = product(product(attended, gate_up)[:, :FFN], down)
        return product(h, weights["lm_head"][0])

    gigabytes = sum(w.numel() for layers in weights.values() for w in layers) * 2e-9
    error = relative_error(step(overlapped), step(F.linear))
    times = medians({name: [lambda p=p: step(p)] for name, p in PRODUCTS.items()}, rounds=15)
    return {
        "batch": batch,
        "error_to_cublas": error,
        "ms": {name: t / 1e3 for name, t in times.items()},
        "share_of_read_ceiling": {name: gigabytes / (t * 1e-6) / ceiling for name, t in times.items()},
        "cublas_over_ours": times["cublas"] / times["ours"],
    }


def product_row(batch: int, name: str, weights: list[Tensor]) -> Json:
    """GB/s of one product alone, over enough weights that no cache holds them."""
    x = normal(batch, weights[0].shape[1])
    weights = weights * 3 if len(weights) == 1 else weights[:16]
    times = medians({n: [lambda w=w, p=p: p(x, w) for w in weights] for n, p in PRODUCTS.items()}, milliseconds=2.0)
    return {"batch": batch, "product": name, "gb_per_s": {n: weights[0].numel() * 2e-3 / t for n, t in times.items()}}


def other_row(model: str, batch: int) -> Json:
    """Milliseconds of another model's products in one graph."""
    layers, shapes, head = OTHERS[model]
    per_layer = [[normal(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(layers)]
    lm_head = normal(*head, scale=head[1] ** -0.5)
    xs = {ins: normal(batch, ins) for ins in {shape[1] for shape in [*shapes, head]}}

    def step(product: Product) -> Tensor:
        for layer in per_layer:
            for w in layer:
                product(xs[w.shape[1]], w)
        return product(xs[head[1]], lm_head)

    times = medians({name: [lambda p=p: step(p)] for name, p in PRODUCTS.items()})
    ms = {name: t / 1e3 for name, t in times.items()}
    return {"model": model, "batch": batch, "ms": ms, "cublas_over_ours": ms["cublas"] / ms["ours"]}


class Step:
    """The inputs that all small kernels of a layer share; one cache of all layers."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.x, self.residual, self.norm = normal(tokens, HIDDEN), normal(tokens, HIDDEN), normal(HIDDEN)
        self.qkv = normal(tokens, HEADS + 2 * KV_HEADS, D)
        self.gate_up = normal(tokens, 2 * FFN)
        self.head_norm = normal(D)
        self.table = normal(VOCAB, HIDDEN)
        self.ids = torch.randint(0, VOCAB, (tokens,), device="cuda")
        cos, sin = rope_tables(5e5 ** -(torch.arange(0, D, 2, device="cuda") / D), 8192)
        positions = torch.randint(0, 8192, (tokens,), device="cuda")
        self.cos, self.sin = cos[positions], sin[positions]
        self.half_cos, self.half_sin = self.cos[:, None, : D // 2], self.sin[:, None, D // 2 :]
        self.slots = torch.randperm(tokens * PAGE, device="cuda")[:tokens]  # pages all over the pool
        self.cache = torch.zeros(tokens, LAYERS, 2, KV_HEADS, PAGE, D, device="cuda", dtype=torch.bfloat16)

    def fused(self, layer: int, norm: Tensor | None, overlap: bool = False) -> Tensor:
        arguments = (self.qkv, self.cos, self.sin, norm, norm, EPS, self.cache, layer, self.slots)
        return qkv_to_pages(*arguments, overlap_previous=overlap)

    def separate(self, layer: int, norm: Tensor | None) -> Tensor:
        """The same by one kernel for each operation."""
        q, k, v = self.qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        if norm is not None:
            q, k = rms_norm_triton(q, None, norm, EPS)[0], rms_norm_triton(k, None, norm, EPS)[0]
        q, k = rope(q, k, self.cos, self.sin)
        page_write(k, v, self.cache, layer, self.slots)
        return q

    def torch_ops(self, layer: int, norm: Tensor | None) -> Tensor:
        q, k, v = self.qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        if norm is not None:
            q, k = F.rms_norm(q, (D,), norm, EPS), F.rms_norm(k, (D,), norm, EPS)
        q, k = self._rotate(q), self._rotate(k)
        page, offset = self.slots // PAGE, self.slots % PAGE
        self.cache[page, layer, 0, :, offset] = k
        self.cache[page, layer, 1, :, offset] = v
        return q

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        turned = torch.cat((a * self.half_cos - b * self.half_sin, b * self.half_cos + a * self.half_sin), -1)
        return turned.to(x.dtype)

    def torch_norm(self) -> tuple[Tensor, Tensor]:
        added = self.x + self.residual
        return F.rms_norm(added, (HIDDEN,), self.norm, EPS), added

    def torch_gate(self) -> Tensor:
        gate, up = self.gate_up.chunk(2, -1)
        return F.silu(gate) * up


def small_rows(tokens: int) -> list[Json]:
    """Microseconds a call of each small kernel."""
    s = Step(tokens)
    layers = range(LAYERS)
    cases: dict[str, dict[str, list[Call]]] = {
        "rms_norm_residual": {
            "ours": [lambda: rms_norm_residual(s.x, s.residual, s.norm, EPS)],
            "ours_overlapped": [lambda: rms_norm_residual(s.x, s.residual, s.norm, EPS, overlap_previous=True)],
            "torch": [s.torch_norm],
        },
        "silu_mul": {
            "ours": [lambda: silu_mul(s.gate_up)],
            "ours_overlapped": [lambda: silu_mul(s.gate_up, overlap_previous=True)],
            "torch": [s.torch_gate],
        },
        "embedding": {
            "ours": [lambda: embedding(s.ids, s.table, torch.bfloat16)],
            "ours_overlapped": [lambda: embedding(s.ids, s.table, torch.bfloat16, overlap_previous=True)],
            "torch": [lambda: F.embedding(s.ids, s.table)],
        },
    }
    for name, norm in (("qkv_to_pages", None), ("qkv_to_pages_qk_norm", s.head_norm)):
        cases[name] = {
            "ours": [lambda n=norm, i=i: s.fused(i, n) for i in layers],
            "ours_overlapped": [lambda n=norm, i=i: s.fused(i, n, True) for i in layers],
            "ours_separate": [lambda n=norm, i=i: s.separate(i, n) for i in layers],
            "torch": [lambda n=norm, i=i: s.torch_ops(i, n) for i in layers],
        }
    return [
        {"kernel": name, "tokens": tokens, "microseconds": medians(calls, milliseconds=1.0)}
        for name, calls in cases.items()
    ]


def step_row(tokens: int, weights: dict[str, list[Tensor]]) -> Json:
    """Milliseconds of a step without its attention: all products and all small kernels, in one graph."""
    s = Step(tokens)

    def step(product: Product, fused: bool) -> Tensor:
        x, residual = embedding(s.ids, s.table, torch.bfloat16, overlap_previous=fused), s.residual
        for layer in range(LAYERS):
            qkv, o, gate_up, down = (weights[name][layer] for name in list(SHAPES)[:4])
            normed, residual = rms_norm_residual(x, residual, s.norm, EPS, overlap_previous=fused)
            s.qkv = product(normed, qkv).view(s.qkv.shape)
            q = s.fused(layer, None, True) if fused else s.separate(layer, None)
            normed, residual = rms_norm_residual(
                product(q.flatten(1), o), residual, s.norm, EPS, overlap_previous=fused
            )
            x = product(silu_mul(product(normed, gate_up), overlap_previous=fused), down)
        return product(rms_norm_residual(x, residual, s.norm, EPS, overlap_previous=fused)[0], weights["lm_head"][0])

    error = relative_error(step(overlapped, True), step(F.linear, False))
    times = medians({"ours": [lambda: step(overlapped, True)], "separate_cublas": [lambda: step(F.linear, False)]})
    return {"tokens": tokens, "error_to_cublas": error, "ms": {name: t / 1e3 for name, t in times.items()}}


def main() -> None:
    """Write the results after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_linear.json"))
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which no row is begun")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = read_ceiling()
    results: Json = {"meta": device_row(), "read_gb_per_s": ceiling}
    results |= {name: [] for name in ("products", "step", "product", "small", "other")}
    print(results["meta"], f"read ceiling {ceiling:.0f} GB/s", flush=True)
    weights = make_weights()
    rows: list[tuple[str, Callable[[], Json | list[Json]]]] = [
        *(("products", lambda b=b: products_row(b, weights, ceiling)) for b in BATCHES),
        *(("step", lambda b=b: step_row(b, weights)) for b in (1, 4, 16, 64)),
        *(("small", lambda n=n: small_rows(n)) for n in (1, 16, 64, 256)),
        *(("product", lambda b=b, n=n: product_row(b, n, weights[n])) for b in (1, 16) for n in SHAPES),
        *(("other", lambda m=m, b=b: other_row(m, b)) for m in OTHERS for b in (1, 4, 16)),
    ]
    began = time.monotonic()
    for section, row in rows:
        if time.monotonic() - began < args.deadline:
            new = row()
            results[section] += new if isinstance(new, list) else [new]
            for line in new if isinstance(new, list) else [new]:
                print(section, json.dumps(line), flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
