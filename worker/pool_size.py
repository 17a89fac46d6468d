"""How many pages a worker's pool has."""

import torch

from engine.config import EngineConfig
from engine.model import Decoder
from protos.errors import FixTheSetup

_CPU_PAGES = 256
_CONTEXT_BYTES = 3 << 29  # CUDA's own, kernels, recorded graphs, the libraries' scratch memory: 1.5 GiB
_GIB = 1 << 30


def pool_pages(config: EngineConfig, model: Decoder, page_bytes: int) -> int:
    """`num_pages`, or else what is left of the worker's part of its GPU beside the weights and the largest step.

    Raises `FixTheSetup` where there is no room for them.
    """
    if model.device.type != "cuda":
        return config.num_pages or _CPU_PAGES
    torch.cuda.empty_cache()  # what loading has left
    free, total = torch.cuda.mem_get_info(model.device)
    mine = int(total * config.gpu_memory)
    rest = torch.cuda.memory_reserved(model.device) + step_bytes(config, model) + _CONTEXT_BYTES
    pages = config.num_pages or (mine - rest) // page_bytes
    if pages < 1:
        raise FixTheSetup(
            f"{mine / _GIB:.1f} GiB of GPU memory leave no room for pages: weights and the largest step take "
            f"{rest / _GIB:.1f}. Give a larger gpu_memory, a smaller token_budget or a GPU for each worker",
            stage="load",
        )
    if pages * page_bytes > free:
        raise FixTheSetup(
            f"{pages} pages take {pages * page_bytes / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of the GPU are free: "
            "give a smaller num_pages or gpu_memory, or end what else uses this GPU",
            stage="load",
        )
    return int(pages)


def step_bytes(config: EngineConfig, model: Decoder) -> int:
    """At most what a step computes in: activations of every token, and what sampling keeps of every row."""
    m = model.config
    widths = 4 * m.hidden + 3 * m.ffn + 2 * (m.heads + 2 * m.kv_heads) * m.head_dim
    activations = 2 * config.token_budget * widths * model.dtype.itemsize  # twice: the allocator's fragments
    return activations + config.max_sequences * m.vocab * 24  # logits, their log-probabilities, counts of tokens
