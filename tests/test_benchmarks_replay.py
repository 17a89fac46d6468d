"""What policies are compared with, and on which loads."""

from benchmarks.agent_load import agent_prompts
from benchmarks.belady import belady_hits
from kvstore.keys import PageKey
from kvstore.replay import replay


def test_who_knows_what_comes_keeps_what_is_read_next():
    assert belady_hits(["a", "b", "c", "a"], 1) == 1  # least recently used would find nothing
    assert belady_hits(["a", "b", "c", "b", "a"], 2) == 2
    assert belady_hits(["abc", "xyz", "abq"], 3) == 2
    assert belady_hits(["abc", "xyz", "abq"], 2) == 0  # longer than the pool
    assert belady_hits(["ab", "x", "x", "ab"], 2) == 2  # the tail went for x, and the head can still be found
    assert belady_hits([], 2) == 0


def test_no_policy_finds_more_and_with_room_for_all_none_finds_less():
    prompts = agent_prompts(documents=True)[:600]
    for pages in (300, 1000, 20_000):
        best = belady_hits(prompts, pages)
        hits = [replay(prompts, pages, policy).hits for policy in ("lru", "reuse")]
        assert max(hits) <= best
    assert hits == [best, best]


def test_the_load_of_agents_is_the_same_for_everyone_and_its_prompts_grow():
    prompts = agent_prompts(documents=False)
    assert prompts == agent_prompts(documents=False)
    assert prompts != agent_prompts(documents=False, seed=1)
    seen: set[PageKey] = set()
    grown = 0
    for prompt in prompts:
        assert len(set(prompt)) == len(prompt)
        found = next((i for i, block in enumerate(prompt) if block not in seen), len(prompt))
        assert not seen.intersection(prompt[found:])  # a block names all before it, too
        grown += found > 0
        seen.update(prompt)
    assert grown > 0.8 * len(prompts)
