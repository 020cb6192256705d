"""One command's jobs, one after the other, each announced, followed by a bar and accounted for."""

from __future__ import annotations

import math
import traceback
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness import preflight
from harness.callback import note_failure
from harness.config import JobSpec, expand
from harness.console import progress, say, say_error
from harness.errors import UserError
from harness.plugins import import_catalogue
from harness.results import Summary
from harness.worker import start_server, take_server_start

LOADING_S = 40.0
"""What the packages and two miniature models take to load on two cores; only for the announcement."""


def run_jobs(cfg: DictConfig) -> str | tuple[float, ...]:
    """What a composed configuration asks for: one paired experiment, or several.

    Returns their results' folder; to a sweeper that searches, and so has a direction, what the first of them costs.

    The heavy packages come in once nothing is left that could be refused without them. A mistake ends a single job
    with exit code 2; in a sweep it is noted and the other jobs go on.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    results = Path(HydraConfig.get().sweep.dir if multirun else cfg.results_dir)
    try:
        specs = expand(cfg)
        for warning in preflight.look(specs[0].config):
            say(f"Note: {warning}.")
        start_server()  # its imports take as long as this process's own, and run beside them
        for spec in specs:
            create(spec)
        if len(specs) == 1 and not multirun:
            return str(results / run_job(specs[0], results).run_id)
    except UserError as error:
        if not multirun:
            say_error(str(error))
            raise SystemExit(2) from None
        note_failure(results, str(cfg.combo), str(error))
        return _returned(results, [])
    if not multirun:
        results /= f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.sweep}"
    summaries = []
    for spec in specs:
        try:
            summaries.append(run_job(spec, results))
        except UserError as error:
            note_failure(results, spec.combo, str(error))
        except Exception:  # a defect: its traceback is shown and kept, and the other jobs go on
            note_failure(results, spec.combo, traceback.format_exc())
    return _returned(results, summaries)


def _returned(results: Path, summaries: list[Summary]) -> str | tuple[float, ...]:
    from harness.report.choice import objectives

    searching = HydraConfig.get().mode == RunMode.MULTIRUN and "direction" in HydraConfig.get().sweeper
    return objectives(summaries[0] if summaries else None) if searching else str(results)


def create(spec: JobSpec) -> None:
    """Raises UserError for a parameter that only the plugin itself can refuse."""
    catalogue = import_catalogue(spec.config["plugin_modules"])
    for name, params in (*spec.toggles.items(), *spec.against_toggles.items()):
        catalogue.create(name, params)


def run_job(spec: JobSpec, results: Path) -> Summary:
    """Run one experiment, showing how far it is; say what it is about before, and where its time went after."""
    from harness import job  # with PyTorch, transformers and chatterbox

    say(announcement(spec))
    with progress() as show:
        summary = job.run(spec, results, show, started=take_server_start())
    say(time_line(summary.timing))
    say(start_line(summary))
    return summary


def announcement(spec: JobSpec) -> str:
    settings = spec.config
    minutes = math.ceil((LOADING_S + 2 * settings["measure"]["budget_s"]) / 60)
    return (
        f"Measuring {spec.combo} ({', '.join(spec.toggles) or 'nothing switched on'}) against the baseline: "
        f"pipeline {settings['pipeline']['name']}, workload {settings['workload']['name']}, "
        f"device {settings['device']}. About {minutes} minutes where speech is made in real time."
    )


def start_line(summary: Summary) -> str:
    """How long each variant's process took to speak for the first time, whatever it prepared, captured or compiled."""
    times = {name: variant.process_to_first_utterance_s for name, variant in summary.variants.items()}
    from harness.report import words

    shown = [f"{name} {words.seconds(time)}" for name, time in times.items()]
    return f"From process start to the first utterance: {', '.join(shown)}."


def time_line(timing: dict[str, float | None]) -> str:
    job_s = timing["job_s"] or 0.0
    shares = {name: (timing[f"{name}_s"] or 0.0) / job_s for name in ("measured", "loading", "orchestration")}
    return (
        f"{job_s:.0f} s: measured calls {shares['measured']:.0%}, loading {shares['loading']:.0%}, "
        f"scoring and evidence {1 - sum(shares.values()):.0%}, orchestration {shares['orchestration']:.1%}."
    )
