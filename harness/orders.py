"""The orders in which optimizations can be switched on, and what is averaged over them.

A set of optimizations is a row of 0 and 1, one entry a name. What a model says of sets is asked for as weighted sums
over them: a part is the average step in which its optimization is switched on, over all orders that can be (L. S.
Shapley, "A Value for n-Person Games", 1953; with prerequisites, the next one is picked by chance among those that can
be switched on). An interaction is the average second difference over the sets of the others: what switching on the one
changes where the other is on, less what it changes where it is off.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Names = tuple[str, ...]
Needs = Mapping[str, frozenset[str]]
"""What each name cannot be on without; of the names themselves."""

ENUMERATED = 12
"""Up to so many optimizations all sets that can be are gone through; for more, orders are drawn."""
SAMPLED = 2000


@dataclass(frozen=True)
class Sums:
    """Weighted sums over sets: `weights` [sums, sets], `sets` [sets, names] of 0 and 1; the first set is empty."""

    sets: np.ndarray
    weights: np.ndarray


def average_steps(names: Names, needs: Needs, orders: int = SAMPLED) -> Sums:
    """A sum for each name: the average step that switches it on; for more than ENUMERATED, over `orders` drawn."""
    weights: dict[frozenset[str], np.ndarray] = {}
    index = {name: i for i, name in enumerate(names)}
    for before, name, weight in _steps(names, needs, orders):
        for on, sign in ((before, -1), (before | {name}, 1)):
            weights.setdefault(on, np.zeros(len(names)))[index[name]] += sign * weight
    return Sums(rows(names, weights), np.stack(list(weights.values()), axis=1))


def sets_that_can_be(names: Names, needs: Needs, orders: int = SAMPLED) -> list[frozenset[str]]:
    """Nothing on, and every set that some order leads through; for more than ENUMERATED, of `orders` drawn."""
    through = (on for before, name, _ in _steps(names, needs, orders) for on in (before, before | {name}))
    return list(dict.fromkeys(through))


def second_differences(names: Names, sets: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The pairs that can be told apart, and weights [pairs, sets]: their average second difference over these sets.

    Of two where one needs the other there is no set with that one alone, so they have none.
    """
    bits = 1 << np.arange(len(names))
    column = {int(mask): i for i, mask in enumerate(sets.astype(int) @ bits)}
    pairs, weights = [], []
    for i, j in combinations(range(len(names)), 2):
        one, other = int(bits[i]), int(bits[j])
        squares = [(mask, mask | one, mask | other, mask | one | other) for mask in column if not mask & (one | other)]
        squares = [square for square in squares if all(mask in column for mask in square)]
        if squares:
            row = np.zeros(len(sets))
            for square in squares:
                row[[column[mask] for mask in square]] += np.array([1, -1, -1, 1]) / len(squares)
            pairs.append((names[i], names[j]))
            weights.append(row)
    return pairs, np.array(weights).reshape(len(pairs), len(sets))


def rows(names: Names, sets: Mapping[frozenset[str], object] | list[frozenset[str]]) -> np.ndarray:
    """The sets as rows of 0 and 1, [sets, names]."""
    return np.array([[float(name in on) for name in names] for on in sets])


def _steps(names: Names, needs: Needs, orders: int) -> Iterator[tuple[frozenset[str], str, float]]:
    """What is on, what is switched on next, and how often an order has that step."""
    if len(names) > ENUMERATED:
        yield from _sampled_steps(names, needs, orders)
        return
    level: dict[frozenset[str], float] = {frozenset(): 1.0}
    for _ in names:
        following: dict[frozenset[str], float] = {}
        for before, weight in level.items():
            ready = _ready(names, needs, before)
            for name in ready:
                yield before, name, weight / len(ready)
                after = before | {name}
                following[after] = following.get(after, 0.0) + weight / len(ready)
        level = following


def _sampled_steps(names: Names, needs: Needs, orders: int) -> Iterator[tuple[frozenset[str], str, float]]:
    rng = np.random.default_rng(0)
    for _ in range(orders):
        before: frozenset[str] = frozenset()
        while ready := _ready(names, needs, before):
            name = ready[rng.integers(len(ready))]
            yield before, name, 1 / orders
            before |= {name}


def _ready(names: Names, needs: Needs, on: frozenset[str]) -> list[str]:
    return [name for name in names if name not in on and needs[name] <= on]
