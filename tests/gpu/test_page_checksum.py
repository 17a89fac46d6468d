"""Checksums that a GPU makes are those that a CPU makes of the same bytes."""

import pytest
import torch

from kernels.page_checksum import page_checksum
from worker.page_checksums import PageChecksums

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 1, 16, 8), (2, 2, 3, 16, 60), (32, 2, 8, 64, 128)], ids=str)
def test_a_gpu_and_a_cpu_agree(shape, dtype):
    cache = torch.randn(5, *shape, device="cuda").to(dtype)
    pages = torch.tensor([4, 0, 2])
    assert torch.equal(page_checksum(cache, pages.cuda()).cpu(), page_checksum(cache.cpu(), pages))


def test_a_worker_makes_them_beside_its_steps():
    cache = torch.randint(-(2**31), 2**31, (4, 100_000), dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy  # the default stream is busy for a while
    assert PageChecksums(cache).of([3, 1]) == PageChecksums(cache.cpu()).of([3, 1])
