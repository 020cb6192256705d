"""How far a sweep is, for a person at a terminal: a line for each job that is measured now, and one for all.

Jobs may run in other processes, even on other hosts. So each leaves how far it is in a small file of the sweep's
folder, and the command's own process draws what it finds there. Where there is no terminal, jobs say it themselves, in
plain lines.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.console import Progress

FOLDER = ".progress"
EVERY_S = 0.5


def is_shown() -> bool:
    """Whether the command draws a board; its jobs leave the terminal to it then."""
    return sys.stdout.isatty()


@contextmanager
def note(folder: Path, key: str, label: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Leaves in the sweep's folder how far a job is, for as long as it lasts; a full disk loses no more than that."""
    path, noted_at = folder / FOLDER / f"{key}.json", -EVERY_S

    def leave(phase: str, done: int, total: int) -> None:
        nonlocal noted_at
        if clock() >= noted_at + EVERY_S:
            noted_at = clock()
            _write(path, {"label": label, "phase": phase, "done": done, "total": total})

    try:
        yield leave
    finally:
        _write(path, {"label": label, "ended": True})


def _write(path: Path, state: Mapping[str, Any]) -> None:
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(path)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What the jobs of a sweep have noted, by their keys."""
    states = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        with suppress(OSError, ValueError):
            states[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return states


@contextmanager
def board(folder: Path, done: int, of: int) -> Iterator[None]:
    """Draws the jobs' notes until they are over: `done` of all `of` were so before."""
    clear(folder)
    if not is_shown():
        yield
        return
    from rich import progress as rich

    columns = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()
    with rich.Progress(*columns, rich.TimeRemainingColumn(), transient=True) as bar:
        draw = _Drawing(bar, done, of)
        over = threading.Event()

        def follow() -> None:
            while not over.wait(EVERY_S):
                draw(read(folder))

        drawing = threading.Thread(target=follow, daemon=True)
        drawing.start()
        try:
            yield
        finally:
            over.set()
            drawing.join()
            clear(folder)


class _Drawing:
    """The lines of a board; `bar` is rich's progress display."""

    def __init__(self, bar: Any, done: int, of: int) -> None:
        self._bar, self._done = bar, done
        self._all = bar.add_task("jobs", total=of, completed=done)
        self._lines: dict[str, Any] = {}

    def __call__(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        ended = [key for key, state in states.items() if state.get("ended")]
        for key, state in states.items():
            if key in ended:
                if key in self._lines:
                    self._bar.remove_task(self._lines.pop(key))
                continue
            if key not in self._lines:
                self._lines[key] = self._bar.add_task(state["label"], total=None)
            words, total = f"{state['label']}: {state['phase']}", state["total"] or None
            self._bar.update(self._lines[key], description=words, completed=state["done"], total=total)
        self._bar.update(self._all, completed=self._done + len(ended))


def clear(folder: Path) -> None:
    """Remove the notes of a sweep that is over, or of one that was killed."""
    with suppress(OSError):
        for path in (folder / FOLDER).glob("*"):
            path.unlink()
        (folder / FOLDER).rmdir()
