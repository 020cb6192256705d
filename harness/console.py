"""What a person reads while a command runs: a bar on a terminal, and elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Is told what goes on: the phase in words, utterances done, utterances in all (0: nobody knows yet)."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...


EVERY_S = 15.0
"""Within a phase, a plain line after so long a time."""


def say(text: str) -> None:
    print(text, flush=True)


def say_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Shows how far a job is, for as long as it lasts."""
    if not sys.stdout.isatty():
        yield PlainLines()
        return
    from rich import progress as rich

    columns = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()
    with rich.Progress(*columns, rich.TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)


class PlainLines:
    """A line when a phase begins, and within it every 15 seconds at most: the phase, done of all, the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._said_at = "", -EVERY_S
        self._first: tuple[float, int] | None = None  # when the first utterances were counted, and how many they were

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        kind = phase.partition(",")[0]  # what both variants do in turns is one phase
        if total and self._first is None:
            self._first = now, done
        if kind == self._phase and now < self._said_at + EVERY_S:
            return
        self._phase, self._said_at = kind, now
        say(f"{phase}{self._how_far(now, done, total)}")

    def _how_far(self, now: float, done: int, total: int) -> str:
        if not total or self._first is None:
            return ""
        since, before = self._first
        if done <= before or done == total:  # behind the last utterance comes work that nobody has counted
            return f": {done} of {total}"
        left_s = (now - since) / (done - before) * (total - done)
        return f": {done} of {total}, about {in_words(left_s)} left"


def in_words(seconds: float) -> str:
    """A span of time to plan by: 40 s, 12 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
