import numpy as np
import pytest

pytest.importorskip("triton")

from kernels.hopper_tiles import deal, make_tiles


def test_a_tile_names_its_rows_and_keys():
    tiles = make_tiles([200, 10], [500, 10], page_size=64, heads=2, tile_rows=128)
    first_row, sees, work, edge, seq, last_slot = tiles[:, :6].T
    assert first_row.tolist() == [0, 128, 0, 128, 200, 200]
    assert sees.tolist() == [300, 428, 300, 428, 0, 0]
    assert (work & 0xFFFF).tolist() == [4, 4, 4, 4, 1, 1]  # keys 0..427 and 0..499; 0..9
    assert (work >> 16).tolist() == [0, 0, 1, 1, 0, 1]
    assert (edge & 0xFF).tolist() == [128, 72, 128, 72, 10, 10]
    assert (edge >> 8).tolist() == [116, 116, 116, 116, 10, 10]  # of the last 128 keys
    assert seq.tolist() == [0, 0, 0, 0, 1, 1]
    assert last_slot.tolist() == [7, 7, 7, 7, 0, 0]


def test_every_tile_is_dealt_once_and_evenly():
    queries, contexts = [512, 300, 4096, 1, 77], [512, 9000, 4096, 20000, 200]
    tiles = make_tiles(queries, contexts, page_size=64, heads=32, tile_rows=128)
    records, counts = deal(tiles, group=4, programs=132)
    dealt = np.concatenate([records[:count, program] for program, count in enumerate(counts)])
    assert sorted(map(tuple, dealt)) == sorted(map(tuple, tiles))
    steps = [int((records[:count, program, 2] & 0xFFFF).sum()) for program, count in enumerate(counts)]
    assert max(steps) <= 1.05 * sum(steps) / len(steps)


def test_fewer_tiles_than_programs():
    records, counts = deal(make_tiles([5], [5], page_size=64, heads=3, tile_rows=128), group=1, programs=132)
    assert records.shape == (1, 3, 8)
    assert counts.tolist() == [1, 1, 1]
