"""What no policy can beat: the hits of one that knows every prompt that is still to come."""

from collections.abc import Hashable, Sequence
from heapq import heappop, heappush
from typing import TypeVar

Block = TypeVar("Block", bound=Hashable)


def belady_hits(prompts: Sequence[Sequence[Block]], pages: int) -> int:
    """Hits of leading runs where the block that is read again last goes first (Belady 1966); children before parents.

    A prompt of more blocks than `pages` finds and keeps nothing, as in the pool.
    """
    following = _next_uses(prompts)
    held: dict[Block, int] = {}  # when it is read next
    leaving: list[tuple[int, int, Block]] = []  # the next use, negative, and the depth: a heap with old entries in it
    hits = 0
    for number, prompt in enumerate(prompts):
        if len(prompt) > pages:
            continue
        found = next((i for i, block in enumerate(prompt) if block not in held), len(prompt))
        hits += found
        for depth, block in enumerate(prompt):
            held[block] = following[number][depth]
            heappush(leaving, (-held[block], -depth, block))
        while len(held) > pages:
            use, _, block = heappop(leaving)
            if held.get(block) == -use:
                del held[block]
    return hits


def _next_uses(prompts: Sequence[Sequence[Block]]) -> list[list[int]]:
    """For each block of each prompt the number of the next prompt that has it, or of one that never comes."""
    last: dict[Block, int] = {}
    following: list[list[int]] = []
    for number in range(len(prompts) - 1, -1, -1):
        following.append([last.get(block, len(prompts)) for block in prompts[number]])
        last.update(dict.fromkeys(prompts[number], number))
    return following[::-1]
