import numpy as np
import pytest

pytest.importorskip("triton")

from kernels.hopper_tiles import deal, make_tiles


def test_a_tile_names_its_rows_and_keys():
    tiles = make_tiles([200, 10], [500, 10], page_size=64, heads=2, tile_rows=128, keys=128)
    first_row, sees, work, edge, seq, last_slot = tiles[:, :6].T
    assert first_row.tolist() == [0, 128, 0, 128, 200, 200]
    assert sees.tolist() == [300, 428, 300, 428, 0, 0]
    assert (work & 0xFFFF).tolist() == [4, 4, 4, 4, 1, 1]  # keys 0..427 and 0..499; 0..9
    assert (work >> 16).tolist() == [0, 0, 1, 1, 0, 1]
    assert (edge & 0xFF).tolist() == [128, 72, 128, 72, 10, 10]
    assert (edge >> 8).tolist() == [116, 116, 116, 116, 10, 10]  # of the last 128 keys
    assert seq.tolist() == [0, 0, 0, 0, 1, 1]
    assert last_slot.tolist() == [7, 7, 7, 7, 0, 0]


def test_steps_of_64_keys():
    tiles = make_tiles([200], [500], page_size=128, heads=1, tile_rows=128, keys=64)
    assert (tiles[:, 2] & 0xFFFF).tolist() == [7, 8]
    assert (tiles[:, 3] >> 8).tolist() == [64, 52]


@pytest.mark.parametrize(("page_size", "keys"), [(16, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("window", [1, 100, 128, 129, 500])
def test_a_window_leaves_out_the_pages_before_it(page_size, keys, window):
    rows, context = 300, 1003
    tiles = make_tiles([rows], [context], page_size, heads=1, tile_rows=128, keys=keys, window=window)
    for start, tile in zip(range(0, rows, 128), tiles, strict=True):
        first_row, sees, steps, edge, _, last_slot, slot, _ = tile.tolist()
        dropped = slot * page_size
        last = context - rows + start  # key of the tile's first row
        end = min(context, last + 128)
        assert first_row == start
        assert dropped <= max(last - window + 1, 0) < dropped + max(page_size, keys)
        assert dropped % keys == 0
        assert sees == last - dropped
        assert (steps - 1) * keys < end - dropped <= steps * keys
        assert edge >> 8 == min(context - dropped - (steps - 1) * keys, keys)
        assert last_slot + slot == (context - 1) // page_size


def test_a_window_of_all_keys_is_none():
    whole = make_tiles([300], [1003], 64, heads=2, tile_rows=128, keys=128)
    assert np.array_equal(make_tiles([300], [1003], 64, heads=2, tile_rows=128, keys=128, window=1003), whole)


def test_every_tile_is_dealt_once_and_evenly():
    queries, contexts = [512, 300, 4096, 1, 77], [512, 9000, 4096, 20000, 200]
    tiles = make_tiles(queries, contexts, page_size=64, heads=32, tile_rows=128, keys=128)
    records, counts = deal(tiles, group=4, programs=132)
    dealt = np.concatenate([records[program, :count] for program, count in enumerate(counts)])
    assert sorted(map(tuple, dealt)) == sorted(map(tuple, tiles))
    steps = [int((records[program, :count, 2] & 0xFFFF).sum()) for program, count in enumerate(counts)]
    assert max(steps) <= 1.05 * sum(steps) / len(steps)


def test_fewer_tiles_than_programs():
    records, counts = deal(make_tiles([5], [5], page_size=64, heads=3, tile_rows=128, keys=128), group=1, programs=132)
    assert records.shape == (3, 1, 8)
    assert counts.tolist() == [1, 1, 1]
