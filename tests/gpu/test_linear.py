"""Products of one or two rows on Hopper, against float64: shapes of real models, views, graphs, dependent launch."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
# (in, out) of SmolLM2-135M, Llama-3-8B, Qwen2.5-7B; and ends that no tile meets, also where the weight is large.
SHAPES = [
    (576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152),
    (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256),
    (3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584), (3584, 152064),
    (8, 1), (1016, 1000), (2056, 129), (24, 8), (72, 8448),
    (1016, 4200), (8200, 513), (72, 58301), (65536, 65), (8, 524288),
]  # fmt: skip


def make(rows: int, ins: int, outs: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(rows, ins, device="cuda").to(dtype)
    return x, (torch.randn(outs, ins, device="cuda") * ins**-0.5).to(dtype)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def poison(rows: int, outs: int, dtype: torch.dtype) -> None:
    """The next result of this size likely takes this memory: what the kernel forgets to write is NaN."""
    torch.full((rows, outs), torch.nan, dtype=dtype, device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_equals_the_product(shape, dtype):
    ins, outs = shape
    for rows in (1, 2):
        x, w = make(rows, ins, outs, dtype, rows)
        exact = x.double() @ w.double().t()
        poison(rows, outs, dtype)
        out = linear(x, w)
        assert relative_error(out, exact) <= 1.2 * relative_error(F.linear(x, w), exact) + 1e-9
        bias = torch.randn(outs, device="cuda").to(dtype)
        exact += bias.double()
        assert relative_error(linear(x, w, bias), exact) <= 1.2 * relative_error(F.linear(x, w, bias), exact) + 1e-9


def test_cublas_has_the_rest():
    x, w = make(3, 4096, 1032, BF16)
    assert torch.equal(linear(x, w), F.linear(x, w))
    x, w = make(2, 4096, 1032, torch.float32)
    assert torch.equal(linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("rows", [1, 2])
def test_views_and_more_dimensions(rows):
    x, w = make(rows, 4096, 1032, BF16)
    expected = linear(x, w)
    wide = torch.full((rows, 6144), torch.nan, dtype=BF16, device="cuda")
    wide[:, 1024:5120] = x
    assert torch.equal(linear(wide[:, 1024:5120], w), expected)
    odd = torch.full((rows, 4099), torch.nan, dtype=BF16, device="cuda")
    odd[:, 3:] = x
    assert torch.equal(linear(odd[:, 3:], w), expected)
    assert torch.equal(linear(x.view(1, rows, 4096), w), expected.view(1, rows, 1032))
    tall = torch.full((1032, 8192), torch.nan, dtype=BF16, device="cuda")
    tall[:, :4096] = w
    assert torch.equal(linear(x, tall[:, :4096]), expected)


@pytest.mark.parametrize("shape", [(4096, 6144), (14336, 4096), (576, 49152)], ids=str)
def test_a_row_is_the_same_bits_beside_another(shape):
    x, w = make(2, *shape, BF16)
    out = linear(x, w)
    assert torch.equal(linear(x[:1], w), out[:1])
    assert torch.equal(linear(x[1:], w), out[1:])
    for _ in range(20):
        assert torch.equal(linear(x, w), out)


def test_not_a_number_stays_in_its_row():
    x, w = make(2, 4096, 6144, BF16)
    clean = linear(x, w)
    x[1, 100] = torch.nan
    out = linear(x, w)
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_chain_in_a_graph_with_dependent_launches(rows):
    """Each product begins before the one in front of it has ended, and must still read all that it wrote."""
    torch.manual_seed(rows)
    sizes = [2048, 4096, 1032, 6144, 2048]
    weights = [(torch.randn(b, a, device="cuda") * a**-0.5).to(BF16) for a, b in pairwise(sizes)] * 6
    x = torch.randn(rows, sizes[0], device="cuda").to(BF16)

    def chain(overlap: bool) -> torch.Tensor:
        y = x + 0
        for w in weights:
            y = linear(y, w, overlap_previous=overlap)
        return y

    chain(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, chain(False))
        assert torch.equal(chain(True), y)
