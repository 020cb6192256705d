"""The later steps alone, on this machine or another: python -m harness score|report|gate RESULTS_DIR...

    score     judge the clips of finished quality passes again, and rebuild the summaries
    report    write one report over all the runs named
    gate      exit with 1 if a run got worse than its limits allow
    index     write reports/README.md, the table of all runs under results/reference

Exit codes: 0 done or passed, 1 regression, 2 bad input, 3 a run is incomplete or failed.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import gate
from harness.errors import UserError
from harness.report import report_name, verdict_line, write_report
from harness.report.index import write_index
from harness.results import RunFolder, find_runs
from harness.summarize import build_summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return gate.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="score|report|gate|index")
    for name, run, says in (
        ("score", _score, "judge clips and rebuild summaries"),
        ("report", _report, "write a report"),
        ("gate", _gate, "check for regressions"),
    ):
        command = commands.add_parser(name, help=says)
        command.set_defaults(run=run)
        command.add_argument(
            "runs", nargs="+", type=Path, metavar="RESULTS_DIR", help="a run's folder, or one that holds runs"
        )
    commands.choices["report"].add_argument("--out", type=Path, help="folder to write (default: reports/<run>)")
    limits = commands.choices["gate"]
    limits.add_argument(
        "--limit",
        action="append",
        metavar="METRIC:AMOUNT",
        help="such as rtf:5%% or wer:+0.02; repeatable (default: the run's own gate.limits)",
    )
    limits.add_argument("--reference", type=Path, metavar="RESULTS_DIR", help="compare with this run's ratios")
    index = commands.add_parser("index", help="write the index of the reference runs")
    index.set_defaults(run=_index)
    return parser


def _score(options: argparse.Namespace) -> int:
    from harness.quality.scoring import score_run  # loads recognizer and speaker model; the others need neither

    for folder in find_runs(options.runs):
        score_run(folder, folder.job().get("quality") or {})
        summary = build_summary(folder)
        folder.rewrite_summary(summary)
        print(verdict_line(summary))
    return gate.PASSED


def _report(options: argparse.Namespace) -> int:
    folders = find_runs(options.runs)
    path = write_report(folders, options.out or Path("reports") / report_name(folders))
    print(path)
    for folder in folders:
        print(verdict_line(folder.summary()))
    return gate.PASSED


def _index(_options: argparse.Namespace) -> int:
    print(write_index(Path("results"), Path("reports")))
    return gate.PASSED


def _gate(options: argparse.Namespace) -> int:
    reference = RunFolder.open(options.reference).summary() if options.reference else None
    summaries, findings = [], []
    for folder in find_runs(options.runs):
        summary = folder.summary()
        configured = (folder.job().get("gate") or {}).get("limits")
        limits = [gate.parse_limit(text) for text in options.limit or configured or gate.DEFAULT_LIMITS]
        found = gate.check(summary, limits, reference)
        print(f"{summary.run_id} ({summary.status})")
        for finding in found:
            print(f"  {finding.sentence}")
        summaries.append(summary)
        findings += found
    return gate.exit_code(summaries, findings)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` that has seen enough is no error
    sys.exit(main())
