"""The clips that a reader may judge by ear: the same text and seed as both variants speak it.

Small enough to travel in the page: MP3, which every browser plays. Both sides of a pair are encoded alike.
"""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import soundfile

from harness.errors import UserError
from harness.report.data import Run
from harness.report.document import Clip, Listening
from harness.results import Measurement, RunFolder

MOST_CLIPS = 6
MOST_CHARACTERS = 2_000_000
"""Of all sounds together, as they stand in the page."""
LEVEL = 0.4
"""Of MP3's compression, from 0 to 1; 0.4 is some 60 kbit/s of 24 kHz speech."""
NOTE = (
    "The same text and random seed, as each variant speaks it, free to choose its own length. The blind test hides "
    "which is which until you have chosen."
)


def listening(run: Run) -> Listening | None:
    """Players for a run whose clips were kept; None for one that has none, as where only its figures were committed."""
    names = (run.reference, run.summary.candidate or "")
    found: list[Clip] = []
    characters = 0
    for one, other in _pairs(run, names):
        before, after = _encoded(run, one), _encoded(run, other)
        if before is None or after is None:
            continue
        characters += len(before) + len(after)
        if len(found) == MOST_CLIPS or characters > MOST_CHARACTERS:
            break
        found.append(Clip(one.text, Path(one.voice).stem, (before, after)))
    return Listening(names, found, NOTE) if found else None


def _pairs(run: Run, names: tuple[str, str]) -> Iterable[tuple[Measurement, Measurement]]:
    """Clips of the quality pass, one seed of every text before the next seed of any."""
    try:
        rows, _ = RunFolder(run.path).measurements()
    except UserError:
        return []
    kept = [row for row in rows if row.pass_name == "quality" and row.audio]
    one, other = ({row.work: row for row in kept if row.variant == name} for name in names)
    turns: dict[tuple[str, str], int] = {}
    order = {}
    for work in one:
        order[work] = turns[work[:2]] = turns.get(work[:2], -1) + 1
    return [(one[work], other[work]) for work in sorted(one, key=order.__getitem__) if work in other]


def _encoded(run: Run, row: Measurement) -> str | None:
    """The clip as a data URI; None for one that is not there or cannot be read."""
    root, path = run.path.resolve(), (run.path / (row.audio or "")).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    try:
        wave, rate = soundfile.read(path, dtype="float32")
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, rate, format="MP3", compression_level=LEVEL)
    except (soundfile.SoundFileError, TypeError):
        return None
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
