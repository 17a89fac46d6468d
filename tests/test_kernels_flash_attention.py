"""FlashAttention's twin against torch's own attention, and its dropout; the kernels' tests are in the interpreter's."""

import pytest
import torch
import torch.nn.functional as F

from kernels.flash_attention import flash_attention, keep_mask


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_scaled_dot_product_attention(causal):
    q, k, v = random(2, 6, 20, 8), random(2, 3, 20, 8), random(2, 3, 20, 8)
    out = flash_attention(q, k, v, causal=causal)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


def test_causal_ends_at_the_last_key():
    q, k, v = random(1, 1, 4, 8), random(1, 1, 2, 8), random(1, 1, 2, 8)
    out = flash_attention(q, k, v, causal=True)
    assert not out[:, :, :2].any()  # they see no key
    torch.testing.assert_close(out[:, :, 2], v[:, :, 0])
    torch.testing.assert_close(out[:, :, 3:], flash_attention(q[:, :, 3:], k, v))
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_dropout_is_fair():
    """A share of dropout_p, in every head and part; no two heads, seeds or offsets alike."""
    shape, dropout_p = (2, 3, 100, 90), 0.3
    keep = keep_mask(shape, dropout_p, seed=2**64 - 1, offset=5)
    for part in (keep, keep[0, 0], keep[1, 2], keep[:, :, :10], keep[..., -10:]):
        deviation = (dropout_p * (1 - dropout_p) / part.numel()) ** 0.5
        assert abs(1 - part.float().mean().item() - dropout_p) < 4 * deviation
    heads = keep.flatten(0, 1).flatten(1).float()
    apart = torch.corrcoef(heads) - torch.eye(6)
    assert apart.abs().max() < 0.05
    assert torch.equal(keep, keep_mask(shape, dropout_p, seed=2**64 - 1, offset=5))
    for seed, offset in ((2**64 - 2, 5), (2**64 - 1, 6)):
        other = keep_mask(shape, dropout_p, seed, offset)
        assert abs(torch.corrcoef(torch.stack((keep.flatten(), other.flatten())).float())[0, 1]) < 0.02


def test_dropout_keeps_the_expectation():
    q, k, v = (random(1, 1, 8, 4).detach() for _ in range(3))
    mean = torch.stack([flash_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in range(2000)]).mean(0)
    torch.testing.assert_close(mean, flash_attention(q, k, v), atol=0.15, rtol=0)


def test_wrong_arguments_are_named():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    for name, arguments in {
        "q": (torch.zeros(4, 3, 8), k, k),
        "q .": (torch.zeros(1, 4, 3, 512), k, k),
        "k .": (q, torch.zeros(1, 3, 3, 8), k),
        "v .": (q, k, torch.zeros(1, 2, 4, 8)),
        "v is torch.float16": (q, k, k.half()),
    }.items():
        with pytest.raises(ValueError, match=name):
            flash_attention(*arguments)
    for name, value in {"dropout_p": 1.0, "seed": -1, "offset": 2**31}.items():
        with pytest.raises(ValueError, match=name):
            flash_attention(q, k, k, **{name: value})
