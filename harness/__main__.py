"""What is not measuring: the later steps alone, on this machine or another, and speaking.

    python -m harness score|report|gate|accept RESULTS_DIR...

    score     judge the clips of finished quality passes again, and rebuild the summaries
    report    write one report over all the runs named
    gate      exit with 1 if a run got worse than its limits allow
    accept    make a run the reference of its experiment and device
    merge     join the folders of several hosts, for one report
    recommend name the best measured combo, and write it down without what earns nothing
    history   follow a figure over the runs of one experiment and device, with its steps
    index     write reports/README.md, the table of all reference runs, reports/index.html over all runs, and the
              figures in README.md
    fidelity  compare combos with the baseline stage by stage, with nothing timed
    say       speak a text with a combo, into a file
    new-optimization  write an optimization of your own to fill in, and its test

Exit codes: 0 done or passed, 1 regression, 2 bad input, 3 nobody knows: undecided, failed.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import fidelity, history, new_optimization, recommend, say
from harness.errors import UserError
from harness.gate import command
from harness.gate.outputs import EXIT_BAD_INPUT, EXIT_PASSED
from harness.report import report_name, verdict_line, write_report
from harness.results import RunFolder, find_runs
from harness.summarize import build_summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = argparse.ArgumentParser(
        prog="python -m harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, says in (
        ("score", _score, "judge clips and rebuild summaries"),
        ("report", _report, "write a report"),
    ):
        step = commands.add_parser(name, help=says)
        step.set_defaults(run=run)
        step.add_argument(
            "runs", nargs="+", type=Path, metavar="RESULTS_DIR", help="a run's folder, or one that holds runs"
        )
    joiner = commands.add_parser("merge", help="join the folders of several hosts")
    joiner.set_defaults(run=_merge)
    joiner.add_argument("sources", nargs="+", type=Path, metavar="SWEEP_DIR", help="what one host measured")
    joiner.add_argument("-o", "--out", type=Path, required=True, help="folder to write, which is not there yet")
    commands.choices["report"].add_argument("--out", type=Path, help="folder to write (default: reports/<run>)")
    judge = commands.add_parser("gate", help="check for regressions")
    judge.set_defaults(run=_gate)
    command.add_gate(judge)
    accept = commands.add_parser("accept", help="make a run a reference")
    accept.set_defaults(run=command.accept)
    command.add_accept(accept)
    for name, module, run, says in (
        ("recommend", recommend, recommend.recommend, "name the best measured combo"),
        ("history", history, history.history, "follow a figure over runs"),
        ("fidelity", fidelity, _fidelity, "compare combos with the baseline stage by stage"),
        ("say", say, _say, "speak a text"),
        ("new-optimization", new_optimization, new_optimization.run, "write an optimization of your own to fill in"),
    ):
        described = commands.add_parser(
            name, help=says, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        described.set_defaults(run=run)
        module.add_arguments(described)
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
    return EXIT_PASSED


def _merge(options: argparse.Namespace) -> int:
    from harness.merge import merge

    for line in merge(options.sources, options.out):
        print(line)
    print(f"`python -m harness report {options.out}` writes one report over all of them")
    return EXIT_PASSED


def _report(options: argparse.Namespace) -> int:
    folders = find_runs(options.runs)
    path = write_report(folders, options.out or Path("reports") / report_name(folders))
    print(path)
    for folder in folders:
        print(verdict_line(folder.summary()))
    return EXIT_PASSED


def _gate(options: argparse.Namespace) -> int:
    def again(runs: Sequence[RunFolder], subjects: Sequence[str]) -> RunFolder:
        from harness.again import measure_again  # loads what measures, which most gates do not need

        with contextlib.redirect_stdout(sys.stderr):  # a gate's own output may be read by a program
            return measure_again(runs, subjects)

    return command.gate(options, again)


def _index(_options: argparse.Namespace) -> int:
    from harness.report.index import write_front, write_index
    from harness.report.overview import write_overview

    results, reports = Path("results"), Path("reports")
    print(write_index(results, reports))
    print(write_overview(results, reports))
    if write_front(Path("README.md"), results, reports):
        print("README.md")
    return EXIT_PASSED


def _fidelity(options: argparse.Namespace) -> int:
    fidelity.run(options)
    return EXIT_PASSED


def _say(options: argparse.Namespace) -> int:
    say.run(options)
    return EXIT_PASSED


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` that has seen enough is no error
    sys.exit(main())
