"""Which program computes which tile of a prefill step, worked out on the host once a step."""

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.hopper_pool import multiprocessors
from kernels.upload import upload

Records = npt.NDArray[np.int32]

GROUP_ROWS = 64  # query rows of a computing group
# A tile's start and end cost as much as this share of a step.
_TILE_OVERHEAD = 0.7


@dataclass(frozen=True)
class PrefillTiles:
    """The tiles of every (sequence, query head), dealt to the programs.

    records [programs, rounds, 8] int32: first row of q; last key that it sees; steps + 65536 * query head;
    rows of the tile + 256 * keys of the last block that belong to the context; offset in the page table; last used
    slot from there on; 0; 0. Keys and slots count from the page where the tile begins: where there is a window, that
    of the oldest key that a row of it sees.
    counts [programs] int32: how many of them a program takes.
    """

    records: Tensor
    counts: Tensor
    groups: int  # of 64 query rows in a tile
    keys: int  # of a step

    @classmethod
    def of(cls, plan: AttentionPlan, heads: int, kv_heads: int, groups: int, keys: int, window: int) -> "PrefillTiles":
        """The plan's sequences after its decodes; rows count from the first of them."""
        device = plan.page_table.device
        programs = multiprocessors(device)
        skip = plan.num_decodes
        queries, contexts = plan.queries[skip:], plan.contexts[skip:]
        tiles = make_tiles(queries, contexts, plan.page_size, heads, groups * GROUP_ROWS, keys, window)
        records, counts = deal(tiles, heads // kv_heads, programs)
        records[:, :, 4] = (records[:, :, 4] + skip) * plan.page_table.stride(0) + records[:, :, 6]
        records[:, :, 6] = 0
        on_device = upload([records, counts], device)
        return cls(on_device[0], on_device[1], groups, keys)


def make_tiles(
    queries: list[int], contexts: list[int], page_size: int, heads: int, tile_rows: int, keys: int, window: int = 0
) -> Records:
    """[tiles, 8], as records, but with two numbers for the offset in the page table: 4 the sequence, 6 the slot."""
    parts = []
    first = 0
    unit = max(page_size, keys)  # a tile begins with a page and a block
    for seq, (rows, context) in enumerate(zip(queries, contexts, strict=True)):
        starts = np.arange(0, rows, tile_rows)
        sees = starts + context - rows  # last key that the tile's first row sees
        old = np.maximum(sees - window + 1, 0) // unit * unit if window else np.zeros_like(sees)
        ends = np.minimum(context, sees + tile_rows) - old  # keys up to the last that the tile's last row sees
        steps = -(-ends // keys)
        edge = np.minimum(rows - starts, tile_rows) + 256 * np.minimum(context - old - (steps - 1) * keys, keys)
        slot = old // page_size
        zero = np.zeros_like(starts)
        columns = [first + starts, sees - old, steps, edge, zero + seq, (context - 1) // page_size - slot, slot]
        of_head = np.stack([*columns, zero], axis=1)
        by_head = np.repeat(of_head[None], heads, axis=0)  # [heads, tiles, 8]
        by_head[:, :, 2] += 65536 * np.arange(heads)[:, None]
        parts.append(by_head.reshape(-1, 8))
        first += rows
    return np.concatenate(parts).astype(np.int32)


def deal(tiles: Records, group: int, programs: int) -> tuple[Records, Records]:
    """Records and counts: each tile goes to the program with the least work so far.

    One (sequence, KV head) after another, the longest sequence and its longest tile first, so that K and V stay in the
    second-level cache; the last quarter of the work longest first throughout, so that all programs end together.
    """
    steps, head, seq = tiles[:, 2] & 0xFFFF, tiles[:, 2] >> 16, tiles[:, 4]
    longest = np.zeros(seq.max() + 1, dtype=np.int64)
    np.maximum.at(longest, seq, steps)
    order = np.lexsort((head, tiles[:, 0], -steps, head // group, seq, -longest[seq]))
    work = np.cumsum(steps[order])
    cut = int(np.searchsorted(work, work[-1] * 0.75))
    tail = order[cut:]
    order[cut:] = tail[np.argsort(-steps[tail], kind="stable")]
    programs = min(programs, len(tiles))
    loads = [(0.0, program) for program in range(programs)]
    owners = np.empty(len(tiles), dtype=np.int64)
    for i, cost in enumerate((steps[order] + _TILE_OVERHEAD).tolist()):
        load, program = loads[0]
        owners[i] = program
        heapq.heapreplace(loads, (load + cost, program))
    counts = np.bincount(owners, minlength=programs)
    by_owner = np.argsort(owners, kind="stable")
    rounds = np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)
    records = np.zeros((programs, counts.max(), 8), dtype=np.int32)
    records[owners[by_owner], rounds] = tiles[order[by_owner]]
    return records, counts.astype(np.int32)
