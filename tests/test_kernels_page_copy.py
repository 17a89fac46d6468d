"""Whole pages, out of a pool and back."""

import pytest
import torch

from kernels.page_copy import page_gather, page_scatter


def pool() -> torch.Tensor:
    return torch.randn(6, 2, 2, 3, 16, 8)


def test_gather():
    cache = pool()
    out = page_gather(cache, torch.tensor([4, 0, 4]))
    assert out.is_contiguous()
    assert torch.equal(out, cache.view(6, -1)[[4, 0, 4]])


def test_scatter_is_the_inverse_and_touches_nothing_else():
    source, target = pool(), pool()
    expected = target.clone()
    expected[[5, 1]] = source[[2, 3]]
    page_scatter(target, torch.tensor([5, 1]), page_gather(source, torch.tensor([2, 3])))
    assert torch.equal(target, expected)


def test_no_pages():
    cache = pool()
    none = torch.tensor([], dtype=torch.int64)
    assert page_gather(cache, none).shape == (0, 2 * 2 * 3 * 16 * 8)
    page_scatter(cache, none, page_gather(cache, none))


def test_wrong_arguments_are_named():
    cache, pages = pool(), torch.tensor([1, 2])
    with pytest.raises(IndexError):
        page_gather(cache, torch.tensor([6]))
    with pytest.raises(ValueError, match="pages"):
        page_gather(cache, pages.int())
    with pytest.raises(ValueError, match="pages"):
        page_scatter(cache, pages[:, None], torch.zeros(2, cache[0].numel()))
    with pytest.raises(ValueError, match="cache"):
        page_gather(cache.transpose(1, 2), pages)
    with pytest.raises(ValueError, match="data"):
        page_scatter(cache, pages, torch.zeros(1, cache[0].numel()))
    with pytest.raises(ValueError, match="data"):
        page_scatter(cache, pages, torch.zeros(2, cache[0].numel()).half())
