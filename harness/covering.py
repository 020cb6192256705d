"""Sets of optimizations in which any few of them are seen together in as many combinations as possible.

A Plackett-Burman design has its runs where straight lines are fitted best. But optimizations meet: what `compile` is
worth depends on `kv_cache`, `cuda_graphs` and on what the weights are made of, and a model that knows of such things
(`harness.surrogate`) tells a part only as well as the combinations of those that meet were seen. Which ones meet is not
known beforehand, so further sets are chosen for all of them alike: each time the one that brings most combinations of
any TOGETHER that were not there yet, as software is tested that has many switches (D. M. Cohen, S. R. Dalal, M. L.
Fredman, G. C. Patton, "The AETG system", IEEE Transactions on Software Engineering 23, 1997). A combination that was
there n times already counts AGAIN ** n.

Sets that take most of the model's own variance (Bayesian A-optimality) were tried, too. They take it sooner, but in
simulations the intervals of one part then missed the truth: the sets that show the model wrong were not among them.
"""

import math
from collections.abc import Callable, Collection
from itertools import combinations

import numpy as np

from harness import orders
from harness.orders import Names, Needs

TOGETHER = 5
"""Tokens, the stage with most switches, depend on so many."""
AGAIN = 0.25
GROUPS = 1000
"""Of more groups than these, so many are drawn."""
ORDERS = 60
"""Of more optimizations than can be enumerated, the sets of so many orders are there to choose from."""

Set = frozenset[str]


def covering(
    names: Names, needs: Needs, measured: Collection[Set], count: int, allowed: Callable[[Set], bool]
) -> list[Set]:
    """The `count` sets to measure beside those that are `measured`, as nothing on always is.

    Fewer, if there are no more. The same names have the same sets.
    """
    sets = orders.sets_that_can_be(names, needs, ORDERS)
    left = np.array([each not in measured and each != frozenset() and allowed(each) for each in sets])
    groups = _groups(len(names))
    seen = np.zeros((len(groups), 2 ** groups.shape[1]))
    every = np.arange(len(groups))
    for row in orders.rows(names, [frozenset(), *measured]):
        seen[every, _combinations(row, groups)] += 1
    there = _combinations(orders.rows(names, sets), groups)  # [sets, groups]
    found: list[Set] = []
    while len(found) < count and left.any():
        worth = (AGAIN**seen)[every, there].sum(axis=1)
        best = int(np.argmax(np.where(left, worth, -1.0)))
        left[best] = False
        seen[every, there[best]] += 1
        found.append(sets[best])
    return found


def _groups(names: int) -> np.ndarray:
    """Every TOGETHER of so many names, or GROUPS of them by chance: their places, [groups, TOGETHER]."""
    together = min(TOGETHER, names)
    if math.comb(names, together) <= GROUPS:
        return np.array(list(combinations(range(names), together)))
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(names, together, replace=False) for _ in range(GROUPS)])


def _combinations(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each group the number of the combination that its names are in, [..., groups]."""
    return rows[..., groups].astype(int) @ (1 << np.arange(groups.shape[1]))
