"""How much of a GPU each worker is given. Ray then says which one, by CUDA_VISIBLE_DEVICES."""

import math

from cluster.config import ClusterConfig

_STEPS = 10_000  # Ray counts resources in ten thousandths


def gpu_share(config: ClusterConfig, gpus: float) -> float:
    """What Ray is asked for, where its nodes have `gpus` in all: 0 for workers that compute on the CPU.

    By default a whole GPU for each worker of the start, and equal parts where there are too few.
    """
    if config.engine.device == "cpu" or gpus < 1:
        return 0.0
    if config.gpu_share is not None:
        return config.gpu_share
    workers = config.prefill + config.decode + config.colocated
    on_each = max(1, math.ceil(workers / int(gpus)))
    return _STEPS // on_each / _STEPS
