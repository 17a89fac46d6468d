"""A plan refuses what would read outside of the pool, and computes shared things once."""

import pytest
import torch

from kernels.attention_plan import AttentionPlan


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(**changes: object) -> dict[str, object]:
    return {
        "page_table": torch.tensor([[3, 1], [0, 9], [2, 4]], dtype=torch.int32),
        "query_starts": ints(0, 1, 2, 7),
        "context_lens": ints(17, 16, 32),
        "num_decodes": 2,
        "page_size": 16,
    } | changes


def test_what_it_knows():
    plan = AttentionPlan(**arguments())
    assert plan.num_tokens == 7
    assert plan.contexts == [17, 16, 32]
    assert plan.queries == [1, 1, 5]
    assert [pages.tolist() for pages in plan.pages()] == [[3, 1], [0], [2, 4]]


def test_decodes_of_several_queries():
    plan = AttentionPlan(**arguments(query_starts=ints(0, 3, 6, 11)), decode_queries=3)
    assert (plan.decode_tokens, plan.num_tokens) == (6, 11)
    with pytest.raises(ValueError, match="num_decodes"):
        AttentionPlan(**arguments(query_starts=ints(0, 3, 4, 11)), decode_queries=3)


def test_builds_once_for_each_key():
    plan, built = AttentionPlan(**arguments()), []
    for key in ("a", "b", "a"):
        plan.once(key, lambda key=key: built.append(key))
    assert built == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"page_table": torch.zeros(3, 2)}, "page_table"),
        ({"page_table": torch.zeros(2, 2, dtype=torch.int32)}, "page_table"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int32).t()}, "page_table"),
        ({"page_table": ints(3, 1)}, "page_table"),
        ({"query_starts": ints(0, 1, 2)}, "query_starts"),
        ({"query_starts": ints(1, 2, 3, 8)}, "query_starts"),
        ({"query_starts": ints(0, 1, 1, 6)}, "query_starts"),
        ({"query_starts": torch.tensor([0, 1, 2, 7])}, "query_starts"),
        ({"context_lens": ints(17, 0, 32)}, "context_lens"),
        ({"context_lens": ints(17, 16, 4)}, "context_lens"),
        ({"context_lens": ints(17, 16, 33)}, "context_lens"),
        ({"context_lens": ints()}, "context_lens"),
        ({"num_decodes": 3}, "num_decodes"),
        ({"num_decodes": 4}, "num_decodes"),
        ({"num_decodes": -1}, "num_decodes"),
    ],
)
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        AttentionPlan(**arguments(**changes))


def pool(pages: int) -> torch.Tensor:
    return torch.zeros(pages, 1, 2, 1, 16, 8)


def test_pages_outside_of_the_pool():
    plan = AttentionPlan(**arguments())
    q = torch.zeros(2, 1, 8)
    plan.check(q, pool(5), 0, tokens=2)  # page 9 stands in a slot past its sequence's context
    with pytest.raises(ValueError, match=r"page_table names pages 0\.\.4 of a cache of 4"):
        plan.check(q, pool(4), 0, tokens=2)
    negative = AttentionPlan(**arguments(page_table=torch.tensor([[3, -1], [0, 9], [2, 4]], dtype=torch.int32)))
    with pytest.raises(ValueError, match="page_table"):
        negative.check(q, pool(5), 0, tokens=2)
