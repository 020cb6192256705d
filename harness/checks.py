"""Whether a variant's speed can be believed: its process's word against the parent's clock and ears.

Each check reads rows and records, and says in one sentence what is wrong, or nothing; a variant of which something is
said has failed. Where timed clips are only understood less well, "faster" is withdrawn (`harness.comparison`).

What is odd in a wave is odd beside the reference's wave of the same request, and where it happens now and then in
honest speech, it has to happen often.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from harness.figures import calls
from harness.records import Child
from harness.results import Measurement

Pair = tuple[Measurement, Measurement]
"""What the two variants made of the same request, the reference's first."""

DURATION_TOLERANCE = 0.01  # relative; the same speech tokens must give the same length of audio ...
TOKEN_S = 0.04  # ... up to one speech token, which is what joining segments may cost a short clip
LEAST_ALLOWANCE_S, MOST_ALLOWANCE_S = 0.010, 0.05
ROUND_TRIPS = 3
SEALING_S = 0.001
"""The two clocks may differ by as many empty round trips, within the bounds above, by what sealing each further wave
may take, and by CLOCK_SHARE of the call, in every second call: a host that is busy delays some, and no figure goes by
the child's clock where it says less."""
CLOCK_SHARE = 0.02
OFTEN = 0.25
"""Share of calls, or of clips, from which on something is no accident ..."""
FEWEST = 3
"""... if as many clips have it."""
IDLE_SHARE, IDLE_CALL_S = 0.05, 0.005
"""CPU time that a process may use between its calls: this share of what it uses in them, and so much for each."""
COPY, NO_COPY = 0.97, 0.94
"""Likeness above which a wave is a copy, if the reference's of the same request stays below the other bound."""
UNLIKE, DEVIATIONS = 0.025, 4.0
"""A clip says something else if it is more unlike the reference's clips of its text than the reference's own are, by so
much and so many of their median deviations. Readings of a text by one voice are 0.014 to 0.04 unlike, other words 0.06
to 0.16."""
UNLIKE_OFTEN = 1 / 3
STRETCHED, NOT_STRETCHED = 0.875, 0.865
"""The same of waves of which one was stretched (`hearing.stretched_likeness`)."""
APART_TIMES, APART = 3.0, 0.15
"""How much farther from the reference's clips, in `hearing.apart`, timed clips may be than nine tenths of free ones."""
SILENT_MORE = 0.30
LEVEL_DB = 12.0
REPEATED_FAST = 0.7
"""A variant keeps results if it answers a request again in less than this share of what the reference needs then."""


def failures(rows: Sequence[Measurement], children: Sequence[Child]) -> list[str]:
    """What is wrong with one variant's speed pass by itself; `children` are its processes."""
    speed = [row for row in rows if row.pass_name == "speed" and row.ok]
    found = [_flaws(speed), _clocks(speed, children)]
    for number, child in enumerate(children):
        found.append(_goes_on(child, [row for row in speed if row.process == number]))
    return [problem for problem in found if problem]


def pair_failures(pairs: Sequence[Pair], free: Sequence[Pair], reference: str) -> list[str]:
    """What is wrong with the candidate's speed pass beside the reference's; `free` are pairs of the quality pass."""
    found = [
        _another_way(pairs, free, reference),
        _duration(pairs, reference),
        _copies(pairs, lambda row: row.repetition, "say something twice"),
        _copies(pairs, lambda row: row.likeness, "are those of an earlier request again"),
        _copies(
            pairs, lambda row: row.stretched_likeness, "are stretched from an earlier one", STRETCHED, NOT_STRETCHED
        ),
        *(
            f"{len(rows)} of {len(pairs)} timed clips {what}, and {reference}'s do not."
            for rows, what, share in _odd(pairs)
            if len(rows) > share * len(pairs) and (len(rows) >= FEWEST or not share)
        ),
    ]
    return [problem for problem in found if problem]


# -- one variant by itself -----------------------------------------------------------------------------------------


def _flaws(rows: Sequence[Measurement]) -> str | None:
    flawed = [row for row in rows if row.flaw]
    return f"{len(flawed)} of {len(rows)} timed clips: {flawed[0].flaw}." if flawed else None


def _clocks(rows: Sequence[Measurement], children: Sequence[Child]) -> str | None:
    """Whether the child's clock and the parent's tell the same."""
    trips = [seconds for child in children for seconds in child.round_trips_s]
    trip_s = statistics.median(trips) if trips else 0.0
    allowance_s = min(max(LEAST_ALLOWANCE_S, ROUND_TRIPS * trip_s), MOST_ALLOWANCE_S)
    clocks = [
        (
            sum(row.generation_time_s or 0.0 for row in call),
            sum(row.parent_time_s or 0.0 for row in call),
            SEALING_S * (len(call) - 1),
        )
        for call in calls([row for row in rows if row.parent_time_s is not None])
    ]
    off = [
        (own_s, ours_s)
        for own_s, ours_s, sealing_s in clocks
        if abs(own_s - ours_s) > allowance_s + sealing_s + CLOCK_SHARE * ours_s
    ]
    if len(off) <= len(clocks) / 2:
        return None
    own_s, ours_s = (sum(side) for side in zip(*off, strict=True))
    return (
        f"by its own clock {len(off)} calls took {own_s:.2f} s, and by the parent's {ours_s:.2f} s: the two have to "
        f"agree within {1000 * allowance_s:.0f} ms a call (an empty one takes {1000 * trip_s:.1f} ms on its way) and "
        f"{CLOCK_SHARE:.0%}."
    )


def _goes_on(child: Child, rows: Sequence[Measurement]) -> str | None:
    """Whether a process works on after it has answered."""
    allowed_s = IDLE_SHARE * child.cpu_in_calls_s + IDLE_CALL_S * len(calls(rows))
    if not rows or child.cpu_between_calls_s <= allowed_s:
        return None
    return (
        f"its process worked on after it had answered: {child.cpu_between_calls_s:.2f} s of CPU time between its "
        f"calls, {child.cpu_in_calls_s:.2f} s in them."
    )


# -- beside the reference ------------------------------------------------------------------------------------------


def _duration(pairs: Sequence[Pair], reference: str) -> str | None:
    """How the candidate's audio differs in length although both spoke the same number of speech tokens."""

    def off(pair: Pair) -> float:
        base, row = pair
        return abs((row.audio_s or 0.0) - (base.audio_s or 0.0))

    same_work = [
        (base, row) for base, row in pairs if base.pinned_tokens is not None and base.pinned_tokens == row.pinned_tokens
    ]
    wrong = [p for p in same_work if off(p) > max(DURATION_TOLERANCE * (p[0].audio_s or 0.0), TOKEN_S)]
    if not wrong:
        return None
    base, row = max(wrong, key=off)
    return (
        f"for the same {row.pinned_tokens} speech tokens of text {row.text_id} it returned "
        f"{row.audio_s:.2f} s of audio and {reference} {base.audio_s:.2f} s "
        f"({len(wrong)} of {len(same_work)} pairs differ): an error, not a speed-up."
    )


def _another_way(pairs: Sequence[Pair], free: Sequence[Pair], reference: str) -> str | None:
    """Whether the candidate speaks as the reference does while it stops by itself, and in another way while timed."""
    timed_ones, free_ones = (
        [distance for base, row in some if (distance := base.apart if row.apart is None else row.apart) is not None]
        for some in (pairs, free)
    )
    if min(len(timed_ones), len(free_ones)) < FEWEST:
        return None
    usual, found = sorted(free_ones)[int(0.9 * len(free_ones))], statistics.median(timed_ones)
    if found <= APART_TIMES * usual + APART:
        return None
    return (
        f"its timed clips are made in another way than those of the quality pass: {found:.2f} apart from {reference}'s "
        f"of the same request, and {usual:.2f} where nothing is timed."
    )


def _odd(pairs: Sequence[Pair]) -> list[tuple[list[Measurement], str, float]]:
    """The candidate's clips that have something which the reference's do not: what, and from which share on it counts.

    What the reference's own clips do among themselves, as the babble of random weights may, is nothing odd.
    """
    silent = [row for base, row in pairs if row.silent and not base.silent]
    broken = [row for base, row in pairs if row.non_finite and not base.non_finite]
    shares = [(base.silent_share or 0.0, row) for base, row in pairs if row.silent_share is not None]
    levels = [(base.level_dbfs, row) for base, row in pairs if base.level_dbfs is not None]
    spread_db = max(LEVEL_DB, DEVIATIONS * _deviation([level for level, _ in levels]))
    off = [row for level, row in levels if row.level_dbfs is not None and abs(row.level_dbfs - level) > spread_db]
    return [
        (silent, "are silent", 0.0),
        (broken, "are not finite", 0.0),
        (_unlike(pairs), "say something else than the text's other clips do", UNLIKE_OFTEN),
        (
            [row for share, row in shares if (row.silent_share or 0.0) > share + SILENT_MORE],
            "are silent for long",
            OFTEN,
        ),
        (off, f"are more than {spread_db:.0f} dB too quiet or too loud", OFTEN),
    ]


def _deviation(values: Sequence[float]) -> float:
    """Median absolute deviation."""
    middle = statistics.median(values) if values else 0.0
    return statistics.median(abs(value - middle) for value in values) if values else 0.0


def _unlike(pairs: Sequence[Pair]) -> list[Measurement]:
    """The candidate's clips that say something else, less as many as the reference has that do."""
    known = [
        (base.unlikeness, row) for base, row in pairs if base.unlikeness is not None and row.unlikeness is not None
    ]
    if not known:
        return []
    own_ones = [own for own, _ in known]
    bound = statistics.median(own_ones) + max(UNLIKE, DEVIATIONS * _deviation(own_ones))
    return [row for _, row in known if (row.unlikeness or 0.0) > bound][sum(own > bound for own in own_ones) :]


def _copies(
    pairs: Sequence[Pair],
    likeness: Callable[[Measurement], float | None],
    what: str,
    copy: float = COPY,
    no_copy: float = NO_COPY,
) -> str | None:
    """Whether many clips are more like something than `copy`, where the reference's stay below `no_copy`."""
    both = [(likeness(base), likeness(row)) for base, row in pairs]
    known = [(before, after) for before, after in both if before is not None and after is not None]
    copies = [after for before, after in known if after > copy and before < no_copy]
    if len(copies) < FEWEST or len(copies) <= OFTEN * len(known):
        return None
    return f"{len(copies)} of {len(known)} timed clips {what}, and the reference's do not."
