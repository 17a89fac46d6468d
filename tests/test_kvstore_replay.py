"""Replaying traces: exact figures on small ones, and clear errors."""

import gzip
import json
import random
from collections import OrderedDict

import pytest

from kvstore.keys import PageKey
from kvstore.replay import read_trace, replay
from protos.errors import InvalidRequest


def keys(*blocks: int) -> list[PageKey]:
    return [PageKey(block.to_bytes(16, "little")) for block in blocks]


def test_hits_are_the_leading_run_that_is_held():
    prompts = [keys(0, 1, 2), keys(0, 1, 3), keys(9, 1, 2), keys(0, 1, 2)]
    result = replay(prompts, 100, "lru")
    assert (result.requests, result.blocks, result.hits, result.too_long) == (4, 12, 2 + 0 + 3, 0)
    assert result.hit_rate == 5 / 12


def test_a_prompt_longer_than_the_pool_is_counted_apart():
    result = replay([keys(1, 2, 3), keys(4), keys(4)], 2, "lru")
    assert (result.blocks, result.hits, result.too_long) == (5, 1, 1)


@pytest.mark.parametrize("pages", [40, 150, 600])
def test_lru_agrees_with_a_plain_list(pages):
    draw = random.Random(pages)
    conversations = [[draw.randint(0, 10**9) for _ in range(30)] for _ in range(40)]
    prompts = [keys(*draw.choice(conversations)[: draw.randint(1, 30)]) for _ in range(500)]
    held: OrderedDict[PageKey, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        found = next((i for i, key in enumerate(prompt) if key not in held), len(prompt))
        hits += found
        for key in prompt:
            held.pop(key, None)
        while len(held) + len(prompt) > pages:
            held.popitem(last=False)
        held.update(dict.fromkeys(reversed(prompt)))
    assert replay(prompts, pages, "lru").hits == hits
    assert hits > 0


def test_reads_plain_and_gzipped_lines(tmp_path):
    lines = "\n".join(json.dumps({"timestamp": 0, "hash_ids": ids}) for ids in ([0, 1], [], [2**60])) + "\n\n"
    plain, zipped = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.gz"
    plain.write_text(lines)
    zipped.write_bytes(gzip.compress(lines.encode()))
    assert list(read_trace(plain)) == list(read_trace(zipped)) == [keys(0, 1), [], keys(2**60)]


@pytest.mark.parametrize(
    "line",
    [
        f'{{"hash_ids": [{2**200}]}}',
        "[]",
        "{}",
        '{"hash_ids": "12"}',
        '{"hash_ids": [1.5]}',
        '{"hash_ids": [-1]}',
        '{"hash_ids": [true]}',
        "x",
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=r"trace\.jsonl, after line 2: "):
        list(read_trace(trace))


def test_a_file_cut_short_is_an_error(tmp_path):
    trace = tmp_path / "trace.jsonl.gz"
    trace.write_bytes(gzip.compress(b'{"hash_ids": [1]}\n' * 1000)[:-20])
    with pytest.raises(InvalidRequest, match="after line"):
        list(read_trace(trace))
