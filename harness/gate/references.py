"""References: which run is the measure of an experiment on a device, since when, and why.

    results/reference/<device>/<combo>-<pipeline>/             the run that holds now, without its clips
                                                  history.jsonl    every run that ever held, with the reason
                                                  earlier/         those before this one

An experiment is a combo and what it is compared with, a pipeline, a workload and a scenario; a device is its hardware
(`fingerprint`).
"""

import datetime
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.gate.decide import EXPERIMENT, Measured, fingerprint, read
from harness.gate.repeats import read_all, repeats_of
from harness.integrity import NOT_KEPT
from harness.results import BASELINE, RunFolder, Summary, append_row, find_runs, is_run, runs_below, slug

HISTORY, EARLIER = "history.jsonl", "earlier"
LEFT_BEHIND = (*(name.rstrip("/") for name in NOT_KEPT), HISTORY, EARLIER, ".*")
"""Of a run's folder, what does not come along when it becomes a reference."""


def experiment(summary: Summary) -> tuple[str, ...]:
    """What a reference is one of."""
    return tuple(getattr(summary, name) for name in EXPERIMENT)


def find(path: Path, run: Measured) -> tuple[RunFolder, Measured]:
    """The reference for a run: `path` itself if it is a run, else the one below it that fits.

    Of the same experiment, on the same device if there is one, else the newest. Raises UserError if none fits.
    """
    candidates = find_runs([path])
    if not is_run(path):
        candidates = [folder for folder in candidates if experiment(folder.summary()) == experiment(run.summary)]
    if not candidates:
        raise UserError(
            f"{path}: no reference of {' '.join(experiment(run.summary))}; measure one and accept it: "
            'python -m harness accept RESULTS_DIR --reason "..."'
        )
    ours = fingerprint(run.environment)
    here = [folder for folder in candidates if fingerprint(folder.read_json("environment.json")) == ours]
    newest = max(here or candidates, key=lambda one: datetime.datetime.fromisoformat(one.summary().created))
    return newest, read_all([newest, *repeats_of(newest)])


def accept(folder: RunFolder, reason: str, references: Path) -> RunFolder:
    """Make a run the reference of its experiment and device; the one before moves to `earlier`. Gives the new one.

    Its repetitions come along: a reference is as certain as all that was measured of it. Raises UserError for a run
    that failed, is incomplete or was edited, and for no reason.
    """
    run = read_all([folder, *repeats_of(folder)])
    if not reason.strip():
        raise UserError("--reason: say why this run becomes the reference; whoever reads its history will ask")
    if run.summary.status != "ok":
        why = run.summary.warnings[0] if run.summary.warnings else "its warnings say why"
        raise UserError(f"{folder.path} is {run.summary.status} and becomes no reference: {why}")
    place = _place(run, references)
    if folder.path.resolve() == place.resolve():
        raise UserError(f"{folder.path} is the reference already")
    place.mkdir(parents=True, exist_ok=True)
    _retire(place)
    shutil.copytree(folder.path, place, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
    append_row(place / HISTORY, _entry(run.summary, reason))
    return RunFolder.open(place)


def _entry(summary: Summary, reason: str) -> dict[str, Any]:
    changes = {name: record.to_dict() for name, record in summary.comparison.items() if record.value is not None}
    return {
        "accepted": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "reason": reason.strip(),
        "run_id": summary.run_id,
        "commit": summary.git,
        "digest": summary.digest,
        "device": summary.device,
        "comparison": changes,
    }


def _retire(place: Path) -> None:
    """Move the run that held until now out of the way, history excepted."""
    if not is_run(place):
        return
    old = place / EARLIER / RunFolder.open(place).summary().run_id
    old.mkdir(parents=True)
    for path in list(place.iterdir()):
        if path.name not in (HISTORY, EARLIER):
            path.rename(old / path.name)


def _place(run: Measured, references: Path) -> Path:
    """Where the reference of this experiment and device is, or will be: under the shortest name that tells it apart."""
    device = next(_free(references, device_names(run.environment, run.summary.device), run, _machine))
    combo, against, pipeline, workload, scenario = map(slug, experiment(run.summary))
    short = f"{combo}-{pipeline}" if against == BASELINE else f"{combo}-against-{against}-{pipeline}"
    names = [short, f"{short}-{workload}", f"{short}-{workload}-{scenario}"]
    return next(_free(device, names, run, lambda one: experiment(one.summary)))


def _free(parent: Path, names: Sequence[str], run: Measured, key: Callable[[Measured], Any]) -> Iterator[Path]:
    """The names under which there is nothing, or nothing that differs from the run in `key`; at last the longest."""
    for name in names:
        inside = runs_below(parent / name)
        if all(key(read(RunFolder.open(path))) == key(run) for path in inside):
            yield parent / name
    yield parent / names[-1]


def _machine(run: Measured) -> tuple[Any, ...]:
    """As much of the fingerprint as every version of this harness noted."""
    return fingerprint(run.environment)[:3]


def device_names(environment: dict[str, Any], device: str) -> list[str]:
    """Names of a folder for a device, from short to exact: cpu-epyc-avx2, cpu-epyc-avx2-2-cores; h200."""
    cpu = environment.get("cpu") or {}
    known = environment.get("device") or {}
    if isinstance(known, dict) and known.get("type") == "cuda":
        return [_short(str(known.get("name"))), _short(f"{known.get('name')} {known.get('memory_mb')} MB")]
    widest = next((width for width in ("amx", "avx512", "avx2") if width in " ".join(cpu.get("features") or ())), "")
    name = f"cpu {cpu.get('model') or device} {widest}"
    return [_short(name), _short(f"{name} {cpu.get('cores')} cores")]


def _short(name: str) -> str:
    """In small letters, without trademarks and makers, and no word twice."""
    words = re.sub(r"\([^)]*\)", " ", name.lower()).split()
    return slug("-".join(word for word in dict.fromkeys(words) if word not in ("amd", "intel", "nvidia", "processor")))
