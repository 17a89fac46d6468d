"""Sequences cut into chunks, packed side by side and spread over pages: the decoder as the engine uses it."""

import random

import torch

from engine.batch import ForwardBatch
from kernels.attention import AttentionPlan


class Pages:
    """A paged cache, and sequences whose pages are scattered over it at random."""

    def __init__(self, model, page_size, pages=64, seed=0, device="cpu"):
        config = model.config
        self.model = model
        self.device = device
        self.page_size = page_size
        shape = (pages, config.layers, 2, config.kv_heads, page_size, config.head_dim)
        # NaN: reading what was not written shows.
        self.cache = torch.full(shape, float("nan"), dtype=model.cache_dtype, device=device)
        self.free = list(range(pages))
        random.Random(seed).shuffle(self.free)
        self.tables = {}
        self.lengths = {}

    def step(self, work):
        """`work` is [(name, token ids)], single tokens first. Returns [logits of each token] of each sequence."""
        tokens, positions, slots, starts, contexts, tables = [], [], [], [0], [], []
        for name, ids in work:
            table, done = self.tables.setdefault(name, []), self.lengths.get(name, 0)
            while len(table) * self.page_size < done + len(ids):
                table.append(self.free.pop())
            span = range(done, done + len(ids))
            tokens += ids
            positions += span
            slots += [table[p // self.page_size] * self.page_size + p % self.page_size for p in span]
            starts.append(len(tokens))
            contexts.append(done + len(ids))
            tables.append(table)
            self.lengths[name] = done + len(ids)
        widest = max(map(len, tables))
        plan = AttentionPlan(
            page_table=self.int32([table + [0] * (widest - len(table)) for table in tables]),
            query_starts=self.int32(starts),
            context_lens=self.int32(contexts),
            num_decodes=sum(len(ids) == 1 for _, ids in work),
            page_size=self.page_size,
        )
        every = range(len(tokens))
        rows = (torch.tensor(row, device=self.device) for row in (tokens, positions, slots, every))
        batch = ForwardBatch(*rows, plan)
        logits = self.model.forward(batch, self.cache)
        assert logits.dtype == torch.float32
        return list(logits.split([len(ids) for _, ids in work]))

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def run(self, sequences, chunks, seed=0):
        """Feed whole sequences side by side, each in pieces of random length from `chunks`. [logits of each]."""
        rng = random.Random(seed)
        left = dict(enumerate(sequences))
        out = {name: [] for name in left}
        while left:
            pieces = [(name, ids[: rng.choice(chunks)]) for name, ids in left.items()]
            pieces.sort(key=lambda piece: len(piece[1]) > 1)
            for (name, ids), logits in zip(pieces, self.step(pieces), strict=True):
                out[name].append(logits)
                left[name] = left[name][len(ids) :]
            left = {name: ids for name, ids in left.items() if ids}
        return [torch.cat(parts) for parts in out.values()]


def assert_close(ours, theirs, bound):
    """`bound` on the largest difference: float32 sums in another order, on logits of up to about 40."""
    difference = (ours - theirs).abs().max().item()
    assert difference < bound, difference
