"""A load of agents at work, made from a seed: prompts that grow turn by turn and begin with one of a few instructions.

A session begins with one of 24 instructions (2 to 16 blocks of 512 tokens; the n-th is taken 1/n as often as the first)
and a task of its own. Every turn sends all that was said so far and what the last tool said. Sessions begin at random
times, on average one in 2 s. They have 8 turns on average, any number being possible, and a turn comes 10 s after the
one before on average, or, once in ten times, 300 s: somebody has to be asked. Sizes spread log-normally.

Beside them documents may be read, each once, as by a batch job that shares the machines: one a second on average.
"""

import random
from itertools import count

from kvstore.keys import KEY_BYTES, PageKey

INSTRUCTIONS = 24
SESSIONS = 1500
BEGIN_S, TURN_S, ASK_S, ASKED = 2.0, 10.0, 300.0, 0.1
TURNS = 8
DOCUMENT_S = 1.0
# Medians, and the logarithm's standard deviation.
TASK_BLOCKS, TOOL_BLOCKS, DOCUMENT_BLOCKS, SPREAD = 4, 2, 8, 0.8
MOST_BLOCKS = 250  # 128k tokens: there a session ends


def agent_prompts(documents: bool, seed: int = 0) -> list[list[PageKey]]:
    """Each prompt's blocks, in the order in which they are sent."""
    rng, fresh = random.Random(seed), count()

    def blocks(median: float) -> list[PageKey]:
        size = max(1, round(rng.lognormvariate(0, SPREAD) * median))
        return [PageKey(next(fresh).to_bytes(KEY_BYTES, "little")) for _ in range(size)]

    instructions = [blocks(1)[:1] + blocks(rng.uniform(1, 15)) for _ in range(INSTRUCTIONS)]
    popularity = [1 / (place + 1) for place in range(INSTRUCTIONS)]
    sent: list[tuple[float, list[PageKey]]] = []
    begin = 0.0
    for _ in range(SESSIONS):
        begin += rng.expovariate(1 / BEGIN_S)
        now, prompt = begin, rng.choices(instructions, popularity)[0] + blocks(TASK_BLOCKS)
        while len(prompt) <= MOST_BLOCKS:
            sent.append((now, prompt))
            if rng.random() < 1 / TURNS:
                break
            now += rng.expovariate(1 / (ASK_S if rng.random() < ASKED else TURN_S))
            prompt = prompt + blocks(TOOL_BLOCKS)
    now = rng.expovariate(1 / DOCUMENT_S)
    while documents and now < begin:
        sent.append((now, instructions[0] + blocks(DOCUMENT_BLOCKS)))
        now += rng.expovariate(1 / DOCUMENT_S)
    return [prompt for _, prompt in sorted(sent, key=lambda turn: turn[0])]
