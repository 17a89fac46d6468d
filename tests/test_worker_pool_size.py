from types import SimpleNamespace

import pytest
import torch

from engine.config import EngineConfig
from protos.errors import FixTheSetup
from worker.pool_size import pool_pages, step_bytes

GIB = 1 << 30
PAGE = 8 << 20
SHAPE = SimpleNamespace(hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256)


def model(device: str):
    return SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, config=SHAPE)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 140 GiB, with 15 GiB of weights in this process."""
    memory = SimpleNamespace(free=120 * GIB, total=140 * GIB, reserved=15 * GIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory.free, memory.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory.reserved)
    return memory


def test_on_a_cpu_there_are_256_or_what_is_asked_for():
    assert pool_pages(EngineConfig(), model("cpu"), PAGE) == 256
    assert pool_pages(EngineConfig(num_pages=7), model("cpu"), PAGE) == 7


def test_on_a_gpu_pages_take_what_weights_and_steps_leave_of_the_workers_part(gpu):
    config = EngineConfig(gpu_memory=0.45, token_budget=8192)
    pages = pool_pages(config, model("cuda"), PAGE)
    taken = 15 * GIB + step_bytes(config, model("cuda")) + 1.5 * GIB
    assert 0 <= 0.45 * 140 * GIB - taken - pages * PAGE < PAGE
    assert 40 * GIB < pages * PAGE < 45 * GIB


def test_two_that_share_a_gpu_fit_whoever_comes_first(gpu):
    config = EngineConfig(gpu_memory=0.45)
    first = pool_pages(config, model("cuda"), PAGE)
    gpu.free -= first * PAGE
    assert pool_pages(config, model("cuda"), PAGE) == first


def test_no_room_is_an_error_that_says_what_takes_it(gpu):
    gpu.total = 16 * GIB
    with pytest.raises(FixTheSetup, match=r"14\.4 GiB of GPU memory leave no room for pages.* token_budget"):
        pool_pages(EngineConfig(), model("cuda"), PAGE)


@pytest.mark.parametrize("asked", [0, 4000])
def test_memory_that_others_use_is_an_error_of_the_start(gpu, asked):
    gpu.free = 20 * GIB
    with pytest.raises(FixTheSetup, match=r"20\.0 GiB of the GPU are free: give a smaller num_pages"):
        pool_pages(EngineConfig(num_pages=asked), model("cuda"), PAGE)
