"""What is undecided is measured again: fresh processes, fresh seeds, and all of it as one run.

A repetition is the run's own job. It has as many pairs of processes, or as many seeds, as all before it together: data
double from one look to the next, so few looks are taken, and the little by which looking several times raises the
chance of a wrong decision stays little. Only what is undecided is repeated at that length.

No repetition is left out. They are kept inside the run's folder, in `repeats/`, and count whenever the run is judged.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import stats
from harness.errors import UserError
from harness.gate.decide import Measured, read
from harness.integrity import UNVERIFIED
from harness.results import RunFolder, runs_below
from harness.summarize import build_summary

REPEATS = "repeats"
TIMED = "_timed"
"""The end of a quality metric's name where it is about clips that were timed."""


def repeats_of(folder: RunFolder) -> list[RunFolder]:
    """The repetitions of a run that there are, in the order in which they were measured."""
    return [RunFolder.open(path) for path in runs_below(folder.path / REPEATS)]


def read_all(runs: Sequence[RunFolder]) -> Measured:
    """A run and its repetitions as one; the first that is in doubt stands for all, for then nothing else matters.

    Raises UserError for runs that cannot count as one, or cannot be read.
    """
    each = [read(run) for run in runs]
    in_doubt = [one for one in each if one.summary.status != "ok"]
    if in_doubt or len(runs) == 1:
        return (in_doubt or each)[0]
    require_same_code(runs)
    with tempfile.TemporaryDirectory() as place:
        folder = pooled(runs, Path(place))
        together = Measured(build_summary(folder), folder.scores()[0], each[0].environment, each[0].job)
    if any(UNVERIFIED in one.summary.warnings for one in each):
        together.summary.warnings.insert(0, UNVERIFIED)
    return together


def is_quality(subject: str) -> bool:
    """Whether a metric comes from the quality pass, and not from what was timed."""
    return (subject == "wer" or subject.startswith("sim_")) and not subject.endswith(TIMED)


def next_job(jobs: Sequence[Mapping[str, Any]], subjects: Iterable[str]) -> dict[str, Any]:
    """The configuration of the next repetition, from those of all runs before it and what is undecided."""
    first, undecided = jobs[0], list(subjects)
    measure, workload = {**first["measure"], "requests_seed": None}, dict(first["workload"])
    used = [seed for job in jobs for seed in job["workload"]["seeds"]]
    if any(map(is_quality, undecided)):
        workload["seeds"] = list(range(max(used) + 1, max(used) + 1 + len(used)))
    else:
        workload["seeds"] = [max(used) + 1]  # one, for the texts' lengths
    if all(map(is_quality, undecided)):
        measure |= {"processes": 1, "min_rounds": 1, "max_rounds": 1}
    else:
        so_far = sum(job["measure"].get("processes", 1) for job in jobs)
        measure["processes"] = max(so_far, stats.MIN_PROCESSES - so_far)
    return {**first, "measure": measure, "workload": workload}


def require_same_code(runs: Sequence[RunFolder]) -> None:
    """Raises UserError if the runs are of different commits or devices, which cannot count as one."""
    first = runs[0]
    for other in runs[1:]:
        for what in ("git", "device", "cpu", "packages"):
            if first.read_json("environment.json").get(what) != other.read_json("environment.json").get(what):
                raise UserError(
                    f"{other.path}: measured with another {what} than {first.run_id}, so the two are not one run; "
                    "remove it, or measure both again"
                )


def pooled(runs: Sequence[RunFolder], into: Path) -> RunFolder:
    """One folder with the rows of all runs, their processes counted on. It has no summary yet, and no clips."""
    folder = RunFolder(into / runs[0].run_id)
    folder.path.mkdir(parents=True)
    folder.write_job(runs[0].job())
    folder.write_json("environment.json", runs[0].read_json("environment.json"))
    processes = 0
    children: dict[str, list[Any]] = {}
    plans: dict[str, dict[str, int]] = {}
    rows, scores, warnings, statuses = [], [], [], []
    for run in runs:
        ours, read = run.measurements()[0], run.scores()[0]
        rows += [replace(row, process=row.process + processes) for row in ours]
        scores += read
        processes += 1 + max((row.process for row in ours), default=0)
        for name, records in run.read_json("children.json").items():
            children.setdefault(name, []).extend(records if isinstance(records, list) else [records])
        for name, plan in run.read_json("plan.json").items():
            total = plans.setdefault(name, {})
            plans[name] = {step: total.get(step, 0) + plan.get(step, 0) for step in {**total, **plan}}
        warnings += run.read_json("timing.json").get("warnings", [])
        statuses.append(run.read_json("optimizations.json"))
    for path, kept in ((folder.utterances_file, rows), (folder.scores_file, scores)):
        path.write_text("".join(json.dumps(row.to_row(), ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    for name, record in (("children", children), ("plan", plans), ("optimizations", _worst(statuses))):
        folder.write_json(f"{name}.json", record)
    folder.write_json("timing.json", {"warnings": list(dict.fromkeys(warnings))})
    return folder


def _worst(statuses: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each variant's optimizations the record of the first run in which it was not active, else of the last run."""
    worst: dict[str, dict[str, Any]] = {}
    for run in reversed(statuses):
        for variant, records in run.items():
            known = worst.setdefault(variant, {})
            for name, record in records.items():
                if name not in known or record["status"] != "active":
                    known[name] = record
    return worst
