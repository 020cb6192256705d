"""Name the best measured combo, and write it down without what earns nothing.

    python -m harness recommend results/RUN... --max-wer-increase 0.01 --max-memory-mb 2000 -o configs/combo/mine.yaml

The file that is written was not measured as it stands, unless a run had just that on: its first line is the command
that does. Exit codes: 0 recommended, 2 bad input, 3 no combo qualifies.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.ablation import place
from harness.errors import UserError
from harness.report import words
from harness.report.choice import Limits, Member, best, front, members, objection, same_parameters
from harness.report.conditions import command
from harness.report.data import Run, load
from harness.report.together import as_one
from harness.results import BASELINE, find_runs, slug, write_atomically

RECOMMENDED, NONE_QUALIFIES = 0, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RESULTS_DIR", help="a run's folder, or one with runs")
    parser.add_argument("--max-wer-increase", type=float, metavar="RATE", help="such as 0.01; its interval has to stay")
    parser.add_argument("--max-memory-mb", type=float, metavar="MB", help="at the memory's peak")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE.yaml", help="write the combo without what earns nothing"
    )


def recommend(options: argparse.Namespace) -> int:
    """The command. Raises UserError for what a user can put right."""
    limits = Limits(options.max_wer_increase, options.max_memory_mb)
    limits.check()
    runs = as_one(load(find_runs(options.runs)))
    places: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        places.setdefault(place(run.summary), []).append(run)
    if options.out is not None:
        _check_out(options.out, list(places))
    chosen = [_tell(here, limits, options.out) for here in places.values()]
    return RECOMMENDED if all(chosen) else NONE_QUALIFIES


def _check_out(out: Path, places: Sequence[tuple[str, ...]]) -> None:
    if len(places) > 1:
        named = "; ".join(" ".join(parts[:3]) for parts in places)
        raise UserError(f"-o {out}: these runs are of {len(places)} places, and each has its own best: {named}")
    if out.suffix != ".yaml" or slug(out.stem) != out.stem or out.stem == BASELINE:
        raise UserError(f"-o {out}: name a new combo's file, such as configs/combo/mine.yaml")
    if out.exists():
        raise UserError(f"-o {out}: the file is there already; choose another name, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.parent}")


def _tell(runs: Sequence[Run], limits: Limits, out: Path | None) -> bool:
    """Print what the runs of one place say; True if a combo qualifies."""
    print(f"{words.plain(runs[0].place)}, workload {runs[0].summary.workload}")
    chosen = best(runs, limits)
    if chosen is None:
        print("  no combo qualifies:")
        for run in runs:
            print(f"    {run.name}: {words.plain(objection(run, limits) or '')}")
        return False
    print(f"  {chosen.name}: {_figures(chosen)}")
    print(f"    {repeat(chosen)}")
    judged = members(chosen, runs)
    for member in judged:
        print(f"    {member.optimization} {member.grade}: {words.plain(member.reason)}")
    kept = [member.optimization for member in judged if member.kept]
    print(f"  {_minimal(chosen, kept, runs)}")
    print("  no measured combo is better in time, memory and quality at once than:")
    for run in front(runs):
        print(f"    {run.name}: {_figures(run)}\n      {repeat(run)}")
    if out is not None:
        write_atomically(out, combo_file(out.stem, chosen, judged))
        print(f"  written: {out}")
    return True


def _figures(run: Run) -> str:
    quality = words.change(run.summary.comparison.get("wer")) if run.baseline.trained else words.NOT_MEASURED
    return (
        f"time ratio {words.change(run.change('rtf'))}, peak memory {words.megabytes(run.combo.peak_memory_mb)}, "
        f"WER change {quality}"
    )


def _minimal(chosen: Run, kept: Sequence[str], runs: Sequence[Run]) -> str:
    if len(kept) == len(chosen.summary.enabled):
        return "nothing in it is known to earn nothing here"
    measured = [
        run
        for run in runs
        if set(run.summary.active) == set(kept) and run.summary.against == BASELINE and same_parameters(run, chosen)
    ]
    told = f"without what earns nothing: {', '.join(kept)}"
    if measured:
        return f"{told}; measured: {_figures(measured[0])}"
    return f"{told}; not measured together yet, and two that earn nothing apart may replace each other: measure it"


def combo_file(name: str, chosen: Run, judged: Sequence[Member]) -> str:
    """The combo of the members that are kept, with their parameters, as a file of configs/combo."""
    settings = chosen.job.get("optimizations") or {}
    left_out = [member.optimization for member in judged if not member.kept]
    lines = [
        "# @package _global_",
        f"# python run_sweep.py +combo={name}",
        f"# From {chosen.summary.run_id}, on {words.plain(chosen.summary.device)}.",
        f"# Without what earned nothing there: {', '.join(left_out) or 'there was no such part'}.",
        f"combo: {name}",
        "optimizations:",
    ]
    for member in judged:
        if member.kept:
            parameters = {"enabled": True, **(settings.get(member.optimization) or {})}
            lines.append(f"  {member.optimization}: {_flow(parameters)}")
    return "\n".join(lines) + "\n"


def _flow(parameters: dict[str, Any]) -> str:
    """A mapping on one line."""
    return yaml.safe_dump(parameters, default_flow_style=True, sort_keys=False, width=10_000).strip()


def repeat(run: Run) -> str:
    """The command line that measures just this combo again; one of a sweep's is spelled out."""
    if not run.job.get("sweep"):
        return command(run)
    settings = run.job.get("optimizations") or {}
    parts = [
        f"optimizations.{name}.{key}={_flow_value(value)}"
        for name in run.summary.enabled
        for key, value in {"enabled": True, **(settings.get(name) or {})}.items()
    ]
    return " ".join(["python run_sweep.py", *parts, *run.pipeline_overrides(), f"workload={run.summary.workload}"])


def _flow_value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
