"""`python -m harness gate` and `python -m harness accept`: from arguments to findings, files and an exit code."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

from harness.errors import UserError
from harness.gate import outputs, references
from harness.gate.decide import UNDECIDED, Measured, check, same_device
from harness.gate.limits import Rules, parse_limits, read_rules, rules_from
from harness.gate.outputs import Judgement, worst
from harness.gate.repeats import read_all, repeats_of
from harness.integrity import UNVERIFIED
from harness.report.conditions import command as measuring_command
from harness.report.data import Run
from harness.results import RunFolder, find_runs
from harness.settings import Gate, check_ranges

DEFAULT_RULES = Path(__file__).resolve().parents[2] / "configs" / "gate" / "default.yaml"
"""For a run whose configuration, with its group `gate`, was not kept."""
Again = Callable[[Sequence[RunFolder], Sequence[str]], RunFolder]
"""Measures the first of the runs again for the subjects that are undecided; see `harness.again`."""
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


def add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that holds runs")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="REF",
        help="an accepted run, or a folder of them (default: the run's own baseline)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="rules, such as configs/gate/ci.yaml (default: the run's own gate.*)",
    )
    parser.add_argument(
        "--limit",
        action="append",
        metavar="METRIC:AMOUNT",
        help="in place of the rules' limits: rtf:5%%, wer:+0.02; repeatable",
    )
    parser.add_argument(
        "--undecided",
        choices=("fail", "pass"),
        default="fail",
        help="what an undecided limit ends as (default: fail, exit code 3)",
    )
    parser.add_argument(
        "--retries", type=int, metavar="N", help="measure what is undecided again up to so often (default: the rules')"
    )
    parser.add_argument(
        "--budget-s", type=float, metavar="S", help="and begin none later than this (default: the rules')"
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")


def add_accept(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--reason", required=True, help="why it becomes the reference; kept in its history")
    parser.add_argument(
        "--references",
        type=Path,
        default=Path("results/reference"),
        metavar="FOLDER",
        help="default: results/reference",
    )


def gate(options: argparse.Namespace, again: Again) -> int:
    """Judge the runs, tell whoever asked, and give the exit code. Raises UserError for bad input."""
    judgements = [judge(folder, options, again) for folder in find_runs(options.runs)]
    passes = options.undecided == "pass"
    code = outputs.exit_code(judgements, passes)
    for line in [outputs.json_line(judgements, code)] if options.json else outputs.lines(judgements):
        print(line)
    if options.junit:
        options.junit.parent.mkdir(parents=True, exist_ok=True)
        outputs.junit(judgements, passes).write(options.junit, encoding="utf-8", xml_declaration=True)
    if summary := os.environ.get(STEP_SUMMARY):
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(outputs.markdown(judgements) + "\n")
    return code


def judge(folder: RunFolder, options: argparse.Namespace, again: Again) -> Judgement:
    """One run held against its rules and its reference; what is undecided is measured again, as far as they allow."""
    rules, started = rules_for(folder, options), time.monotonic()
    runs = [folder, *repeats_of(folder)]
    run, told = read_all(runs), []
    found = references.find(options.reference, run) if options.reference else None
    reference = found[1] if found else None
    findings = check(run, rules, reference)
    for _ in range(rules.retries):
        undecided = [finding.subject for finding in findings if finding.outcome == UNDECIDED]
        if worst(finding.outcome for finding in findings) != UNDECIDED or time.monotonic() - started > rules.budget_s:
            break
        print(f"{folder.run_id}: {', '.join(undecided)} undecided, so measured again", file=sys.stderr, flush=True)
        try:
            with answers_alone():
                runs.append(again(runs, undecided))
        except UserError as error:
            told.append(f"not measured again: {error}")
            break
        run = read_all(runs)
        findings = check(run, rules, reference)
    if len(runs) > 1:
        told.append(f"with {len(runs) - 1} repetitions, {run.summary.processes} pairs of processes in all")
    repeat = repeating(folder, run, found[0] if found else None, options)
    return Judgement(run, reference, findings, repeat, [*told, *notes(run, reference)])


@contextmanager
def answers_alone() -> Iterator[None]:
    """What a job says of its progress, its processes' words included, goes to standard error meanwhile.

    Standard output is the gate's answer, which with `--json` is one line that a program reads.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def rules_for(folder: RunFolder, options: argparse.Namespace) -> Rules:
    """From `--config`, else from the run's own configuration, else the default ones; other arguments replace parts."""
    own = folder.job().get("gate") or {}
    rules = read_rules(options.config) if options.config else rules_from(own) if own else read_rules(DEFAULT_RULES)
    effort = {"retries": options.retries, "budget_s": options.budget_s}
    effort = {name: value for name, value in effort.items() if value is not None}
    check_ranges("gate", Gate, effort)
    rules = replace(rules, **effort)
    if not options.limit:
        return rules
    limits = parse_limits(options.limit)
    subjects = {limit.subject for limit in limits}
    return replace(rules, limits=limits, elsewhere=tuple(one for one in rules.elsewhere if one.subject in subjects))


def repeating(folder: RunFolder, run: Measured, reference: RunFolder | None, options: argparse.Namespace) -> str:
    """The command that measures this run's experiment again, and judges that."""
    results = Path("results") / f"{folder.run_id}-again"
    parts = ["python", "-m", "harness", "gate", str(results)]
    parts += ["--reference", str(reference.path)] if reference else []
    parts += ["--config", str(options.config)] if options.config else []
    parts += [part for limit in options.limit or () for part in ("--limit", limit)]
    measure = measuring_command(Run(run.summary, run.job, run.environment, folder.path))
    return f"{measure} results_dir={shlex.quote(str(results))} && {shlex.join(parts)}"


def notes(run: Measured, reference: Measured | None) -> list[str]:
    """What takes weight from the findings, or gives a reader the scale: absolute figures where they may be compared."""
    told = [f"the run is {note}" for note in run.summary.warnings if note == UNVERIFIED]
    if reference is None:
        return told
    told += [f"the reference is {note}" for note in reference.summary.warnings if note == UNVERIFIED]
    if not same_device(run, reference):
        return [*told, "the reference was measured on another device: only ratios are compared, by the limits for that"]
    now, then = (measured.summary.variants.get(measured.summary.candidate or "") for measured in (run, reference))
    if now and then and now.rtf and then.rtf:
        told.append(f"on the same device the combo's RTF was {then.rtf:.4g} in the reference, and is {now.rtf:.4g} now")
    return told


def accept(options: argparse.Namespace) -> int:
    """Make a run the reference of its experiment and device. Raises UserError for one that cannot be."""
    taken = references.accept(RunFolder.open(options.folder), options.reason, options.references)
    place = taken.path
    report = Path("reports") / place.relative_to("results") if place.is_relative_to("results") else place / "report"
    print(f"{place} is the reference now: {taken.summary().run_id}")
    print(f"Its report and the index: python -m harness report {place} --out {report} && python -m harness index")
    return outputs.EXIT_PASSED
