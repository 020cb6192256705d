"""How much a call's time varies here, and how much of that its neighbours share: what pairing is worth."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from harness.errors import UserError
from harness.figures import timed
from harness.report import words
from harness.report.data import Run
from harness.results import Measurement, RunFolder

FEWEST = 30
"""Pairs below which a correlation says nothing."""
Points = list[tuple[float, float]]


def told(runs: Sequence[Run]) -> str | None:
    """In a sentence's part; None where rows are too few, or several texts share a call."""
    calls = [_varying(run) for run in runs]
    alike = [_to_scale(rows) for rows in calls]
    sides = [point for rows in alike for point in _sides(rows)]
    turns = [point for rows in alike for point in _turns(rows)]
    if len(sides) < FEWEST:
        return None
    shared = [f"{_correlation(sides):.2f} the two sides of a turn"]
    if len(turns) >= FEWEST:
        shared.append(f"{_correlation(turns):.2f} the same side's calls in neighbouring turns")
    deviation = statistics.pstdev((value for rows in calls for _, value in rows), mu=0.0)
    return f"by {words.percent(deviation)} from call to call; of this share (correlation) {words.listing(shared)}"


Call = tuple[Measurement, float]


def _varying(run: Run) -> list[Call]:
    """Each timed call in the order of time, and the logarithm of its time less what its work explains."""
    try:
        rows = [row for row in timed(RunFolder(run.path).measurements()[0]) if row.batch_size == 1]
    except UserError:
        return []
    rows.sort(key=lambda row: (row.process, row.started_s or 0.0))
    works: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        works.setdefault((row.variant, row.text_id), []).append(row)
    several = [work for work in works.values() if len(work) > 2]  # a line goes through any two
    left = {id(row): value for work in several for row, value in zip(work, _unexplained(work), strict=True)}
    return [(row, left[id(row)]) for row in rows if id(row) in left]


def _unexplained(rows: Sequence[Measurement]) -> list[float]:
    """One variant's calls of one text, whose length is another each time: the distance from the line through them."""
    logs, lengths = [math.log(row.time_s or math.nan) for row in rows], [row.audio_s or 0.0 for row in rows]
    if len(set(lengths)) < 2:
        mean = statistics.fmean(logs)
        return [value - mean for value in logs]
    slope, start = statistics.linear_regression(lengths, logs)
    return [value - start - slope * length for value, length in zip(logs, lengths, strict=True)]


def _to_scale(calls: Sequence[Call]) -> list[Call]:
    """In deviations of their own variant, for else the noisiest of many jobs would speak for all."""
    names = {row.variant for row, _ in calls}
    sizes = {name: statistics.pstdev((v for row, v in calls if row.variant == name), mu=0.0) or 1.0 for name in names}
    return [(row, value / sizes[row.variant]) for row, value in calls]


def _sides(calls: Iterable[Call]) -> Points:
    """The two sides' calls of the same request, who came first before the other: being first is no noise."""
    found: dict[tuple[str, str, int, int, int, int], list[float]] = {}
    for row, value in calls:
        found.setdefault(row.pair, []).append(value)
    return [(values[0], values[1]) for values in found.values() if len(values) == 2]


def _turns(calls: Sequence[Call]) -> Points:
    """Neighbours of one side: as the order flips, who was last in a turn is the first in the next."""
    return [
        (value, after)
        for (row, value), (following, after) in pairwise(calls)
        if (row.variant, row.process) == (following.variant, following.process) and following.started_s
    ]


def _correlation(points: Points) -> float:
    first, second = zip(*points, strict=True)
    return statistics.correlation(first, second) if len(set(first)) > 1 < len(set(second)) else 0.0
