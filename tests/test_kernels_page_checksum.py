"""A checksum of each page: the same for the same bytes, another for any small change."""

import numpy as np
import pytest
import torch

from kernels.page_checksum import page_checksum

PAGES = torch.tensor([2, 0])


def by_hand(page: torch.Tensor) -> int:
    words = page.reshape(-1).view(torch.uint8).numpy().view("<u4")
    value = sum((2 * index + 1) * int(word) for index, word in enumerate(words)) % 2**64
    return int(np.uint64(value).astype(np.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_weighted_sum_of_the_words(dtype):
    cache = torch.randn(3, 2, 2, 1, 4, 8).to(dtype)
    assert page_checksum(cache, PAGES).tolist() == [by_hand(cache[2]), by_hand(cache[0])]


def test_every_bit_and_every_exchange_of_words_shows():
    cache = torch.randint(-(2**31), 2**31, (1, 24), dtype=torch.int32)
    cache[0, 3], cache[0, 7] = -1, 0  # the largest difference
    first = torch.tensor([0])
    before = page_checksum(cache, first)
    for bit in range(24 * 32):
        changed = cache.clone()
        changed.view(torch.uint8)[0, bit // 8] ^= 1 << bit % 8
        assert page_checksum(changed, first) != before
    for one in range(24):
        for other in range(one):
            changed = cache.clone()
            changed[0, [one, other]] = cache[0, [other, one]]
            assert page_checksum(changed, first) != before


def test_no_pages():
    assert page_checksum(torch.zeros(2, 8), torch.tensor([], dtype=torch.int64)).tolist() == []


def test_a_pool_with_gaps_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        page_checksum(torch.zeros(2, 3, 4).transpose(1, 2), PAGES)
