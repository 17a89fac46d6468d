"""What is sent to a resident batch arrives in its rows, and nowhere else."""

import torch

from engine.resident_batch import ResidentBatch

CPU = torch.device("cpu")


def state(batch, row):
    return batch.token_ids[row].item(), batch.context_lens[row].item(), batch.page_table[row].tolist()


def test_nothing_is_sent_before_the_flush():
    batch = ResidentBatch(3, 4, CPU)
    batch.fill(1, 70000, 6, [9, 8])
    assert state(batch, 1) == (0, 0, [0, 0, 0, 0])
    batch.flush()
    assert state(batch, 1) == (70000, 6, [9, 8, 0, 0])
    assert state(batch, 0) == state(batch, 2) == (0, 0, [0, 0, 0, 0])


def test_rows_grow_by_what_is_new():
    batch = ResidentBatch(2, 4, CPU)
    batch.fill(0, 1, 2, [5])
    batch.flush()
    batch.page_table[0, 0] = 99  # would be written again
    batch.grow(0, [5, 6, 7])
    batch.flush()
    assert batch.page_table[0].tolist() == [99, 6, 7, 0]


def test_a_row_that_is_filled_again_takes_all_its_pages():
    batch = ResidentBatch(2, 4, CPU)
    batch.fill(0, 1, 2, [5, 6, 7])
    batch.flush()
    batch.fill(0, 3, 1, [4, 2])
    batch.flush()
    assert state(batch, 0)[:2] == (3, 1)
    assert batch.page_table[0, :2].tolist() == [4, 2]


def test_moves_happen_at_once_and_before_what_is_written_with_them():
    batch = ResidentBatch(3, 2, CPU)
    for row in range(3):
        batch.fill(row, 10 + row, 1 + row, [row])
    batch.flush()
    moves = [(1, 0), (2, 1)]
    batch.move(moves, torch.tensor(moves).T)
    batch.empty(2)
    batch.grow(1, [2, 7])
    batch.flush()
    assert [state(batch, row)[0] for row in (0, 1)] == [11, 12]
    assert batch.context_lens.tolist() == [2, 3, 0]
    assert batch.page_table[:2].tolist() == [[1, 0], [2, 7]]


def test_next_tokens_come_from_the_device():
    batch = ResidentBatch(3, 2, CPU)
    batch.next_tokens(torch.tensor([2, 0]), torch.tensor([8, 9]), torch.tensor([5, 0], dtype=torch.int32))
    assert batch.token_ids.tolist() == [9, 0, 8]
    assert batch.context_lens.tolist() == [0, 0, 5]
