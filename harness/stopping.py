"""Whether the speed pass has its answer, so that it may end before its time is up.

Noise decides how many pairs a small change takes, and nobody knows it beforehand. Two things end the rounds:

- **Precision**: a change of the size that was asked for would have been found. The interval's width decides, and not
  what it shows, so that looking at it again and again leaves its coverage nearly as it is, the nearer the more pairs
  there are at the first look (Y. S. Chow, H. Robbins, Annals of Mathematical Statistics 36, 1965).
- **Certainty**: a change that a single look would get wrong once in a thousand times (J. L. Haybittle, British Journal
  of Radiology 44, 1971; R. Peto and others, British Journal of Cancer 34, 1976). Stopping at the first verdict instead
  would find one in identical code sooner or later.
"""

from collections.abc import Sequence

from harness import stats
from harness.checks import Pair
from harness.comparison import speed
from harness.scenarios.base import Figure

BEYOND_DOUBT = 0.001
A_LOOK = 999
"""Resamples of a first look, for between two rounds nobody should wait; what it finds has to hold with all of them."""


def is_answered(pairs: Sequence[Pair], figure: Figure, threshold: float, detectable: float) -> bool:
    """Whether these pairs would have found a change of this figure by `detectable` (0.05: 5 %), or show one surely.

    Changes below the threshold do not count. Pairs that are too few for an interval answer nothing.
    """
    measure = stats.metric(figure.name)

    def answers(resamples: int) -> bool:
        found = speed(pairs, [figure], resamples)
        if figure.name not in found:
            return False
        change, _ = found[figure.name]
        smallest = stats.smallest_detectable(change, threshold, measure)
        p = stats.p_value(change, threshold, measure)
        return smallest is not None and p is not None and (smallest <= detectable or p <= BEYOND_DOUBT)

    return answers(A_LOOK) and answers(stats.RESAMPLES)
