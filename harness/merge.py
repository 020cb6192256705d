"""Join what several hosts measured: `python -m harness merge A B -o C`.

Each source becomes a folder of its own in C, as it is, and C's report stands over all of them. Ratios are from paired
jobs, so they stand beside each other wherever they were measured; absolute figures do not, and are shown host by host.
Of a job that one host did not finish and another did, what the first left is not taken along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness import plan
from harness.errors import UserError
from harness.results import FAILURES, MERGED, runs_below, slug, write_atomically


def merge(sources: Sequence[Path], into: Path) -> list[str]:
    """Copy the runs of all sources; the lines that say what came of it.

    Raises UserError for a source without runs, one that is named twice, and for a folder that is there already.
    """
    if len({source.resolve() for source in sources}) < len(sources):
        raise UserError("merge: the same folder is named twice")
    if empty := [source for source in sources if not runs_below(source)]:
        raise UserError(f"{empty[0]}: no runs in it; name folders that run_sweep.py wrote under results/")
    if into.exists():
        raise UserError(f"{into} is there already: name a folder that is not, so that nothing is written over")
    if inside := [source for source in sources if into.resolve().is_relative_to(source.resolve())]:
        raise UserError(f"{into} is inside {inside[0]}: name a folder elsewhere")

    finished = set().union(*(plan.done(source) for source in sources))
    names, lines = _names(sources), []
    partial = into.with_name(f".{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for source, name in zip(sources, names, strict=True):
            taken, left = _divided(source, finished)
            for run in taken:
                shutil.copytree(run, partial / name / run.name, symlinks=True)
            for extra in (plan.FILE, FAILURES):
                if (source / extra).is_file():
                    shutil.copy2(source / extra, partial / name / extra)
            told = f", without what {len(left)} jobs left that another host finished" if left else ""
            lines.append(f"{name}: {len(taken)} runs of {source}{told}")
        write_atomically(partial / MERGED, json.dumps({"sources": names}, indent=2) + "\n")
        partial.rename(into)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {into} ({error.strerror or error}): make room, or name another folder") from None
    return lines


def _divided(source: Path, finished: set[str]) -> tuple[list[Path], list[Path]]:
    """The runs that are taken along, and those of jobs that only another host finished."""
    own = plan.done(source)
    runs = runs_below(source)
    left = [run for run in runs if (key := plan.key_of(run)) in finished and key not in own]
    return [run for run in runs if run not in left], left


def _names(sources: Sequence[Path]) -> list[str]:
    """What the sources are called in the joined folder: by their own names, numbered where two have the same."""
    names: list[str] = []
    for source in sources:
        name = slug(source.resolve().name)
        same = sum(other == name or other.startswith(f"{name}-host") for other in names)
        names.append(f"{name}-host{same + 1}" if same else name)
    return names
