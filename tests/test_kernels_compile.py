"""Every Triton kernel compiles for a Hopper GPU, without one, as its launcher launches it, and spills no register."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.cascade_attention import cascade_attention_triton
from kernels.decode_attention import decode_attention_triton
from kernels.embedding import embedding_triton
from kernels.merge_attention import merge_attention_triton
from kernels.page_checksum import page_checksum_triton
from kernels.page_copy import page_gather_triton, page_scatter_triton
from kernels.page_write import page_write_triton
from kernels.prefill_attention import prefill_attention_triton
from kernels.qkv_to_pages import qkv_to_pages_triton
from kernels.resident_rows import advance_rows_triton, row_places_triton
from kernels.rms_norm import rms_norm_triton
from kernels.rope import rope_triton
from kernels.silu_mul import silu_mul_triton
from kernels.triton_kernel import TritonKernel
from kernels_oracle import make_case

pytest.importorskip("triton")

BF16 = torch.bfloat16
SHAPES = {
    "32-8-128-page64": {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 64, "dtype": BF16},
    "9-3-64-page16": {"heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 16, "dtype": BF16},
    "4-4-96-page128": {"heads": 4, "kv_heads": 4, "head_dim": 96, "page_size": 128, "dtype": BF16},
    "8-1-256-page64": {"heads": 8, "kv_heads": 1, "head_dim": 256, "page_size": 64, "dtype": BF16},
    "9-3-64-page64-float32": {"heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 64, "dtype": torch.float32},
}
SHARED_MEMORY = 227 * 1024  # bytes a program can have
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


@pytest.fixture
def launches(monkeypatch, tmp_path) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What would have been launched: kernel, arguments, keywords."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: TritonKernel, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: recorded.append((kernel.jitted, arguments, keywords))

    monkeypatch.setattr(TritonKernel, "__getitem__", record)
    return recorded


def compile_for_hopper(jitted: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Specialised as at a launch: constants, ones, and what is divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in keywords}
    signature, constants, attributes = {}, dict(keywords), {}
    for index, (name, value) in enumerate(zip(jitted.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], divisible = TYPES[value.dtype], True
        elif value is None:
            constants[name], divisible = None, False
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32", value % 16 == 0
            if value == 1:
                constants[name] = 1
        if divisible and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in constants:
        signature[name] = "constexpr"
    signature = {name: signature[name] for name in jitted.arg_names}
    source = ASTSource(fn=jitted, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check(launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]], tmp_path, names: list[str]) -> None:
    from triton import knobs

    assert [jitted.__name__ for jitted, _, _ in launches] == names
    for launch in launches:
        compiled = compile_for_hopper(*launch)
        assert compiled.metadata.shared <= SHARED_MEMORY
        file = tmp_path / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        assert " REG:" in usage
        assert " STACK:0 " in usage, usage
        assert " LOCAL:0 " in usage, usage


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_attention(launches, tmp_path, shape):
    case = make_case([100, 300], [1, 1], **shape)
    decode_attention_triton(case.q, case.cache, 1, case.plan(), torch.empty(case.q.shape[:2]))
    check(launches, tmp_path, ["_decode_split", "_decode_merge"])


def test_decode_attention_with_options(launches, tmp_path):
    case = make_case([100, 300], [4, 4], **SHAPES["32-8-128-page64"])
    decode_attention_triton(case.q, case.cache, 1, case.plan(4, batch_invariant=True), window=70, soft_cap=30.0)
    check(launches, tmp_path, ["_decode_split", "_decode_merge"])


def test_cascade_attention(launches, tmp_path):
    case = make_case([100, 300], [1, 1], **SHAPES["32-8-128-page64"])
    cascade_attention_triton(case.q, case.cache, 1, case.plan(), 64)
    part = torch.empty(2, 32, 128)
    merge_attention_triton(part, part[..., 0], part, part[..., 0], BF16, part[..., 0])
    check(launches, tmp_path, ["_decode_split", "_decode_merge"] * 2 + ["_merge_attention"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prefill_attention(launches, tmp_path, shape):
    case = make_case([100, 300], [100, 200], **shape)
    prefill_attention_triton(case.q, case.cache, 1, case.plan(), torch.empty(case.q.shape[:2]))
    check(launches, tmp_path, ["_prefill"])


@pytest.mark.parametrize("options", [{"window": 4096}, {"window": 128, "soft_cap": 50.0}], ids=str)
@pytest.mark.parametrize("name", ["32-8-128-page64", "8-1-256-page64"])
def test_prefill_attention_with_options(launches, tmp_path, name, options):
    case = make_case([100, 300], [100, 200], **SHAPES[name])
    prefill_attention_triton(case.q, case.cache, 1, case.plan(), torch.empty(case.q.shape[:2]), **options)
    check(launches, tmp_path, ["_prefill"])


def test_the_rest_of_a_layer(launches, tmp_path):
    x, w = torch.empty(3, 4096, dtype=BF16), torch.empty(4096, dtype=BF16)
    rms_norm_triton(x, None, w, 1e-5)
    rms_norm_triton(x, x, w, 1e-5)
    qkv = torch.empty(3, 48, 128, dtype=BF16)
    tables = torch.empty(3, 128)
    rope_triton(qkv[:, :32], qkv[:, 32:40], tables, tables)
    cache = torch.empty(2, 2, 2, 8, 64, 128, dtype=BF16)
    page_write_triton(qkv[:, 32:40], qkv[:, 40:], cache, 1, torch.zeros(3, dtype=torch.int64))
    silu_mul_triton(torch.empty(3, 2 * 14336, dtype=BF16))
    flat, pages = cache.view(2, -1), torch.tensor([1])
    page_scatter_triton(flat, pages, page_gather_triton(flat, pages))
    page_checksum_triton(flat.view(torch.int32), pages)
    names = ["_rms_norm", "_rms_norm", "_rope", "_page_write", "_silu_mul", "_page_copy", "_page_copy"]
    check(launches, tmp_path, [*names, "_page_checksum"])


@pytest.mark.parametrize("overlap", [False, True])
def test_the_fused_step(launches, tmp_path, monkeypatch, overlap):
    for module in ("embedding", "qkv_to_pages", "rms_norm", "silu_mul"):
        monkeypatch.setattr(f"kernels.{module}.is_hopper", lambda device: True)
    ids, table = torch.zeros(3, dtype=torch.int64), torch.empty(100, 4096, dtype=BF16)
    x = embedding_triton(ids, table, BF16, overlap_previous=overlap)
    rms_norm_triton(x, x, table[0], 1e-5, overlap_previous=overlap)
    tables, norm, qkv = torch.empty(3, 128), torch.empty(128, dtype=BF16), torch.empty(3, 48, 128, dtype=BF16)
    cache = torch.empty(2, 2, 2, 8, 64, 128, dtype=BF16)
    for w in (None, norm):
        qkv_to_pages_triton(qkv, tables, tables, w, w, 1e-5, cache, 1, ids, overlap_previous=overlap)
    silu_mul_triton(torch.empty(3, 2 * 14336, dtype=BF16), overlap_previous=overlap)
    assert all(keywords.get("launch_pdl", False) == overlap for _, _, keywords in launches)
    check(launches, tmp_path, ["_embedding", "_rms_norm", "_qkv_to_pages", "_qkv_to_pages", "_silu_mul"])


def test_resident_rows(launches, tmp_path):
    lengths, table = torch.ones(64, dtype=torch.int32), torch.zeros(64, 128, dtype=torch.int32)
    row_places_triton(lengths, table, 64)
    advance_rows_triton(torch.zeros(64, dtype=torch.int64), lengths, torch.zeros(64, dtype=torch.int64))
    check(launches, tmp_path, ["_row_places", "_advance_rows"])
