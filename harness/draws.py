"""Requests that nobody has seen before: seeds and lengths from one generator.

Whatever a variant remembers of a request, its result, its tokens, machine code for its length, is of no use for the
next one. A child cannot know beforehand what it will be asked: the generator's own seed is the experiment's secret
until its processes have ended, and is then recorded, so that a run can be repeated.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Iterable

from harness.scenarios import Request
from harness.workload import Item

SPREAD = 0.10
"""Lengths lie within this share of the reference's own."""
APART = 0.03
"""As long as there is room, lengths of one text differ by this share of it."""


class Draws:
    """The source of all seeds and lengths of an experiment; `taken` are the seeds of the quality pass."""

    def __init__(self, seed: int | None, taken: Iterable[int]) -> None:
        self.seed = secrets.randbits(63) if seed is None else seed
        self._random = random.Random(self.seed)
        self._taken = set(taken)
        self._lengths: dict[Item, list[int]] = {}

    def request(self, item: Item, count: int | None) -> Request:
        """The item with a seed and a length that it has not had. Without a count, the model stops itself."""
        return Request(item, self._seed(), None if count is None else self._length(item, count))

    def number(self) -> int:
        """A seed for something else than speech."""
        return self._random.randrange(2**31)

    def _seed(self) -> int:
        while (seed := self._random.randrange(2**31)) in self._taken:
            pass
        self._taken.add(seed)
        return seed

    def _length(self, item: Item, count: int) -> int:
        earlier = self._lengths.setdefault(item, [])
        earlier.append(fresh_length(count, earlier, self._random))
        return earlier[-1]


def fresh_length(count: int, earlier: list[int], source: random.Random) -> int:
    """A number of tokens near `count`, a few per cent from each earlier one; where all is taken, from the latest.

    >>> fresh_length(100, list(range(90, 108)), random.Random(0))
    110
    """
    near = range(max(1, math.ceil((1 - SPREAD) * count)), max(1, math.floor((1 + SPREAD) * count)) + 1)
    apart = max(1.0, APART * count)
    for forgotten in range(len(earlier) + 1):
        free = [n for n in near if all(abs(n - other) >= apart for other in earlier[forgotten:])]
        if free:
            return source.choice(free)
    return count
