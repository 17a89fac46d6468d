"""Pages lent for a test of transports."""

import pytest

from kvstore.page_state import PageState
from kvstore.pool import OutOfPages, PagePool
from worker.loan import Loan


def test_lent_pages_are_nobodys_until_they_are_given_back():
    pool = PagePool(8)
    loan = Loan()
    refs = loan.take(pool, 5)
    assert [ref.index for ref in refs] == list(range(5))
    assert [ref.page for ref in refs] == loan.pages
    assert {pool.state(page) for page in loan.pages} == {PageState.FILLING}
    assert pool.available_pages == 3
    for _ in range(2):
        loan.give_back()
        assert (pool.available_pages, pool.held_pages) == (8, 0)
    # Whoever still reads them finds that they are not the ones that were lent.
    assert all(pool.generation(page) == ref.generation + 1 for page, ref in zip(loan.pages, refs, strict=True))


def test_more_than_there_is_is_not_lent():
    pool = PagePool(8)
    loan = Loan()
    loan.give_back()
    with pytest.raises(OutOfPages):
        loan.take(pool, 9)
    loan.give_back()
    assert pool.available_pages == 8
