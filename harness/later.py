"""Measured here, judged elsewhere: `quality.score=later` leaves a run's clips as one archive, for another machine.

    python run_sweep.py +combo=production quality.score=later       on the machine that is worth its time
    python -m harness score results/RUN                             on one that has the judges, and time

Until somebody has listened, such a run is incomplete: nothing may be concluded of its quality.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import UserError
from harness.integrity import ARCHIVE
from harness.results import RunFolder

CLIPS = "audio"


def pack(folder: RunFolder) -> None:
    """Put a run's clips into one archive, in place of their folder."""
    if not (folder.path / CLIPS).is_dir():
        return
    partial = folder.path / f".{ARCHIVE}.partial"
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for clip in sorted((folder.path / CLIPS).rglob("*.wav")):
            archive.write(clip, clip.relative_to(folder.path))
    partial.replace(folder.path / ARCHIVE)
    shutil.rmtree(folder.path / CLIPS)


@contextmanager
def unpacked(folder: RunFolder) -> Iterator[Path]:
    """Where a run's clips are, under the names that its rows have for them, for as long as somebody listens.

    Raises UserError for an archive that cannot be read.
    """
    if not (archive := folder.path / ARCHIVE).is_file():
        yield folder.path
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(archive) as clips:
                clips.extractall(temporary)  # which keeps every name below the folder
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{archive}: cannot be read ({error}); copy it again from where it was measured") from None
        yield Path(temporary)


def is_later(folder: RunFolder) -> bool:
    """Whether a run was to be judged later."""
    return (folder.job().get("quality") or {}).get("score") == "later"


def awaits_scores(folder: RunFolder) -> bool:
    """Whether all of a run is there but its scores, which are for later."""
    if not is_later(folder) or folder.scores_file.exists():
        return False
    counts = Counter((row.variant, row.pass_name) for row in folder.measurements()[0] if row.ok)
    owed = folder.read_json("plan.json")
    return bool(owed) and all(counts[name, step] >= n for name, steps in owed.items() for step, n in steps.items())
