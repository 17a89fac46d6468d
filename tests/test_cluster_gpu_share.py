import pytest

from cluster.config import ClusterConfig
from cluster.gpu_share import gpu_share


def config(device="auto", **settings) -> ClusterConfig:
    return ClusterConfig.model_validate({"engine": {"device": device}, **settings})


@pytest.mark.parametrize(
    ("gpus", "prefill", "decode", "wanted"),
    [(1, 1, 1, 0.5), (2, 1, 1, 1.0), (8, 1, 1, 1.0), (2, 1, 2, 0.5), (1, 1, 2, 0.3333), (4, 2, 4, 0.5), (1, 0, 0, 1.0)],
)
def test_every_worker_of_the_start_gets_an_equal_part(gpus, prefill, decode, wanted):
    assert gpu_share(config(prefill=prefill, decode=decode), gpus) == wanted
    on_each = int(1 / wanted)
    assert on_each * wanted <= 1  # Ray puts no fraction on two GPUs
    assert on_each * gpus >= prefill + decode


def test_a_colocated_worker_has_a_gpu_alone():
    assert gpu_share(config(mode="colocated"), 1) == 1.0


def test_an_operator_may_say_how_much():
    assert gpu_share(config(gpu_share=0.25), 1) == 0.25


def test_without_gpus_ray_is_asked_for_none():
    assert gpu_share(config(), 0) == 0.0
    assert gpu_share(config("cpu", gpu_share=0.5), 8) == 0.0
