"""A run under load: for how many callers at a time its variants are good, as one figure and by how requests come."""

from collections.abc import Mapping
from typing import Any

from harness.report import words
from harness.report.data import Run
from harness.report.document import Tile

LOOPS = ("closed", "open")


def headline(run: Run) -> str:
    """What each keeps, in a sentence; empty where nobody was put under load."""
    if not run.combo.loaded:
        return ""
    each = [f"in {how} loop ({_kept(run.combo.loaded, how)} and {_kept(run.baseline.loaded, how)})" for how in LOOPS]
    return f"{run.code} keeps {_one_figure(run)}, {' as '.join(each)}. "


def clauses(run: Run) -> list[str]:
    """The same with what became of the next larger load; none where nobody was put under load."""
    if not run.combo.loaded:
        return []
    each = [
        f"{how} loop {_told(run.combo.loaded, how)}, {run.versus} {_told(run.baseline.loaded, how)}" for how in LOOPS
    ]
    return [_one_figure(run), *each]


def tiles(run: Run) -> list[Tile]:
    return [_tile(run, how) for how in LOOPS] if run.combo.loaded else []


def _one_figure(run: Run) -> str:
    """The largest load that each keeps, in whatever way requests come."""
    ours, theirs = run.combo.loaded, run.baseline.loaded
    return (
        f"**{words.streams(ours['streams'])}** on one {words.said(run.summary.device)}, {run.versus} "
        f"{words.counted(theirs.get('streams'))}: first audio within {words.seconds(ours['first_audio_limit_s'])} for "
        "99 % and no underrun"
    )


def _tile(run: Run, how: str) -> Tile:
    ours, theirs = (side.loaded.get(f"streams_{how}") for side in (run.combo, run.baseline))
    sense = "neutral" if ours is None or theirs is None or ours == theirs else "good" if ours > theirs else "bad"
    return Tile(
        "?" if ours is None else words.counted(ours),
        f"streams at a time in {how} loop; {run.versus}: {words.counted(theirs)}",
        f"{_beyond(run.combo.loaded, how)}; {run.versus}: {_beyond(run.baseline.loaded, how)}",
        sense,
    )


def _kept(loaded: Mapping[str, Any], how: str) -> str:
    return words.counted(loaded.get(f"streams_{how}"))


def _told(loaded: Mapping[str, Any], how: str) -> str:
    return f"{_kept(loaded, how)} ({_beyond(loaded, how)})"


def _beyond(loaded: Mapping[str, Any], how: str) -> str:
    """Why the nearest load that was not kept was not: the next after the largest that was, or the smallest of all."""
    levels = [one for one in loaded.get("levels", ()) if one["load"] == how]
    missed = next((one for one in levels if not one["kept"]), None)
    if missed is None:
        return "no more were tried" if levels else words.NOT_MEASURED
    late_s = missed["first_p99_s"]
    if late_s is not None and late_s > loaded["first_audio_limit_s"]:
        why = f"first audio after {words.seconds(late_s)}"
    elif late_s is not None and missed["underruns"]:
        why = words.count(missed["underruns"], "underrun")
    else:
        why = "not all were answered"
    return f"{why} at {words.counted(missed['size'])}"
