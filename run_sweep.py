"""Measure which optimizations really help Chatterbox TTS here, and whether they hurt the voice.

    python run_sweep.py +combo=production                  one combo against the baseline, then its report
    python run_sweep.py +sweep=one_at_a_time               each optimization alone
    python run_sweep.py +combo=production +sweep=leave_one_out
    python run_sweep.py -m '+combo=glob(*)'                every combo
    python run_sweep.py +combo=baseline                    identical code against itself: the noise floor

Any setting of configs/ can follow, for example pipeline=chatterbox device=cuda workload=standard
optimizations.vocos.enabled=false. Exit codes: 0 measured, 1 a job failed or is incomplete, 2 bad input.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.console import OUT, say, say_error
from harness.errors import UserError
from harness.worker import start_server

if TYPE_CHECKING:  # imported where they are used: heavy, and the forkserver's imports should begin before theirs
    from harness.config import JobSpec
    from harness.results import Summary

CONFIGS = Path(__file__).resolve().parent / "configs"
_starts = [time.monotonic()]
ASKS_ONLY = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}
PERTH_WARNING = "pkg_resources is deprecated"
LOADING_S = 40.0
"""What the packages and two miniature models take to load on two cores; only for the announcement."""


def main() -> int:
    """The command; returns its exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong, and here it becomes one line
    os.environ.setdefault("PYTHONWARNINGS", f"ignore:{PERTH_WARNING}:UserWarning")  # for the children
    warnings.filterwarnings("ignore", PERTH_WARNING)
    try:
        if not ASKS_ONLY & set(sys.argv):
            start_server()  # it imports the heavy packages while this process imports the catalogue
        from harness.callback import ReportCallback
        from harness.config import register_catalogue

        ReportCallback.exit_code = 0
        register_catalogue(argument for argument in sys.argv[1:] if not argument.startswith("-"))
        sweep()
    except UserError as error:
        say_error(str(error))
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        from harness.config import explain

        say_error(explain(error))
        return 2
    except KeyboardInterrupt:
        say_error("interrupted: what was measured until then is in the results folder")
        return 130
    except SystemExit as end:  # --help and its like, and bad input found inside a job
        return end.code if isinstance(end.code, int) else 0
    return ReportCallback.exit_code


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def sweep(cfg: DictConfig) -> str:
    """One Hydra job: one paired experiment, or several in a row. Returns the folder that holds its results."""
    from harness.callback import note_failure
    from harness.config import expand

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    results = Path(HydraConfig.get().sweep.dir if multirun else cfg.results_dir)
    try:
        specs = expand(cfg)
        if len(specs) == 1 and not multirun:
            return str(results / measure(specs[0], results).run_id)
    except UserError as error:
        if not multirun:
            say_error(str(error))
            raise SystemExit(2) from None
        note_failure(results, str(cfg.combo), str(error))
        return str(results)
    if not multirun:
        results /= f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.sweep}"
    for spec in specs:
        try:
            measure(spec, results)
        except UserError as error:
            note_failure(results, spec.combo, str(error))
        except Exception:  # a defect: its traceback is shown and kept, and the other jobs go on
            note_failure(results, spec.combo, traceback.format_exc())
    return str(results)


def measure(spec: JobSpec, results: Path) -> Summary:
    """Run one experiment behind a progress bar, and say what it is about and where its time went."""
    from harness import job

    say(announcement(spec))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=OUT, transient=True, disable=not OUT.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        summary = job.run(
            spec,
            results,
            progress=lambda phase, done, total: bar.update(
                task, description=phase, completed=done, total=total or None
            ),
            started=_first_start(),
        )
    say(time_line(summary.timing))
    return summary


def _first_start() -> float | None:
    """When this process started, once: its first job's clock began there."""
    return _starts.pop() if _starts else None


def announcement(spec: JobSpec) -> str:
    settings = spec.config
    minutes = math.ceil((LOADING_S + 2 * settings["measure"]["budget_s"]) / 60)
    return (
        f"Measuring {spec.combo} ({', '.join(spec.toggles) or 'nothing switched on'}) against the baseline: "
        f"pipeline {settings['pipeline']['name']}, workload {settings['workload']['name']}, "
        f"device {settings['device']}. About {minutes} minutes where speech is made in real time."
    )


def time_line(timing: dict[str, float | None]) -> str:
    job_s = timing["job_s"] or 0.0
    shares = {name: (timing.get(f"{name}_s") or 0.0) / job_s for name in ("measured", "loading", "orchestration")}
    return (
        f"{job_s:.0f} s: measured calls {shares['measured']:.0%}, loading {shares['loading']:.0%}, "
        f"scoring and evidence {1 - sum(shares.values()):.0%}, orchestration {shares['orchestration']:.1%}."
    )


if __name__ == "__main__":
    sys.exit(main())
