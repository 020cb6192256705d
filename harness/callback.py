"""What happens once a command's jobs are over: the report, the verdicts, the exit code."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness import plan
from harness.console import say, say_error
from harness.errors import UserError
from harness.later import awaits_scores
from harness.results import FAILURES, find_runs, is_run


def note_failure(results: Path, combo: str, words: str) -> None:
    """A job of a sweep left no results: say so now, and keep it for the sweep's end."""
    say_error(f"{combo}: {words}")
    try:
        results.mkdir(parents=True, exist_ok=True)
        with (results / FAILURES).open("a") as stream:
            stream.write(f"{combo}: {words.rstrip()}\n\n")
    except OSError as error:  # a full disk, which may be why the job failed
        say_error(f"{results / FAILURES} cannot be written ({error.strerror})")


class ReportCallback(Callback):
    """Hydra's hook at a command's end: one report over all its runs, and its path and the verdicts as last lines."""

    exit_code: ClassVar[int] = 0

    def on_run_end(self, config: DictConfig, **details: Any) -> None:
        ended: JobReturn = details["job_return"]
        if ended.status == JobStatus.COMPLETED and not config.dry_run:
            self._finish(Path(ended.return_value), Path(config.reports_dir))

    def on_multirun_end(self, config: DictConfig, **details: Any) -> None:
        if not config.dry_run:
            self._finish(Path(config.hydra.sweep.dir), Path(config.reports_dir))

    def _finish(self, results: Path, reports: Path) -> None:
        """Hydra would turn an exception into a warning; here it decides the exit code."""
        try:
            ReportCallback.exit_code = finish(results, reports)
        except UserError as error:  # a file of some run that is damaged
            say_error(str(error))
            ReportCallback.exit_code = 1
        except Exception:
            say_error(traceback.format_exc())
            ReportCallback.exit_code = 1


def finish(results: Path, reports: Path) -> int:
    """Write the report over a run's or a sweep's folder and say what was found; the command's exit code."""
    lost = (results / FAILURES).exists()
    missing = plan.missing(results)
    if (lost or missing) and not any(is_run(child) for child in results.iterdir()):
        return 1
    from harness.report import report_name, verdict_line, write_report  # plots take a second to import
    from harness.summarize import build_summary

    runs = find_runs([results])
    for run in runs:
        if not run.summary_file.exists():  # its process was killed
            run.rewrite_summary(build_summary(run))
    path = write_report(runs, reports / report_name(runs))
    summaries = [run.summary() for run in runs]
    for summary in summaries:
        say(verdict_line(summary))
    if later := [run for run in runs if awaits_scores(run)]:
        say(f"Not judged yet: {len(later)} of {len(runs)} runs. `python -m harness score {results}` does it, anywhere.")
    if lost:
        say(f"Some jobs left no results: {results / FAILURES} says why.")
    if missing:
        say(f"Not measured to the end: {', '.join(missing)}. The same command goes on with them.")
    say(f"Report: {path}")
    unfinished = [
        run for run, summary in zip(runs, summaries, strict=True) if summary.status != "ok" and run not in later
    ]
    return 1 if lost or missing or any(unfinished) else 0
