"""What happens once a command's jobs are over: the report, the verdicts, the exit code."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

_OUT = Console(highlight=False, soft_wrap=True)
_ERR = Console(stderr=True, highlight=False, soft_wrap=True)
FAILURES = "failures.txt"
"""In a sweep's folder: what became of the jobs that left no results, one paragraph each."""


def say(text: str) -> None:
    _OUT.print(text, markup=False)


def say_error(text: str) -> None:
    _ERR.print(text, markup=False)


def note_failure(results: Path, combo: str, words: str) -> None:
    """A job of a sweep left no results: say so now, and keep it for the sweep's end."""
    say_error(f"{combo}: {words}")
    results.mkdir(parents=True, exist_ok=True)
    with (results / FAILURES).open("a") as stream:
        stream.write(f"{combo}: {words.rstrip()}\n\n")


class ReportCallback(Callback):
    """Writes one report over all runs of the command, and ends with its path and the verdicts."""

    exit_code: ClassVar[int] = 0

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if isinstance(job_return._return_value, str):
            self._finish(Path(job_return._return_value), Path(config.reports_dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self._finish(Path(config.hydra.sweep.dir), Path(config.reports_dir))

    def _finish(self, results: Path, reports: Path) -> None:
        """Hydra turns a callback's exceptions into warnings; here they must reach the exit code."""
        try:
            ReportCallback.exit_code = finish(results, reports)
        except Exception:
            say_error(traceback.format_exc())
            ReportCallback.exit_code = 1


def finish(results: Path, reports: Path) -> int:
    """Write the report, print where it is and what was found; the command's exit code."""
    raise NotImplementedError
