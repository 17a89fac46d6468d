"""Chunks become one packed batch: whose tokens, where they stand, where they are written, which are wanted."""

import torch

from engine.packing import pack
from engine.sampling_params import SamplingParams
from engine.scheduler import Chunk
from engine_rig import GREEDY, Request

PAGE = 4
CPU = torch.device("cpu")


def chunk(prompt, pages, start, count, *, sampling=GREEDY, answer_len=5):
    sequence = Request(0, "a", tuple(prompt), answer_len, sampling=sampling).sequence(PAGE)
    sequence.pages = list(pages)
    return Chunk(sequence, start, start + count, is_last=start + count == len(prompt))


def test_tokens_positions_and_slots():
    chunks = [chunk(range(100, 110), [9, 2, 5], 5, 5), chunk(range(200, 206), [7, 1], 0, 3)]
    batch = pack(chunks, PAGE, CPU)
    assert batch.token_ids.tolist() == [105, 106, 107, 108, 109, 200, 201, 202]
    assert batch.positions.tolist() == [5, 6, 7, 8, 9, 0, 1, 2]
    assert batch.slots.tolist() == [9, 10, 11, 20, 21, 28, 29, 30]
    assert batch.logit_rows.tolist() == [4]
    assert batch.plan.page_table.tolist() == [[9, 2, 5], [7, 1, 0]]
    assert batch.plan.starts == batch.plan.query_starts.tolist() == [0, 5, 8]
    assert batch.plan.contexts == batch.plan.context_lens.tolist() == [10, 3]


def test_scored_tokens_come_after_the_last_ones():
    asked = SamplingParams(prompt_logprobs=0)
    chunks = [chunk(range(6), [0, 1], 2, 4, sampling=asked), chunk(range(5), [2, 3], 0, 5)]
    assert pack(chunks, PAGE, CPU).logit_rows.tolist() == [3, 8, 0, 1, 2]
