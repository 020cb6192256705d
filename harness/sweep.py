"""One job of a command: refused or announced, followed by a bar and accounted for."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness import board, plan, preflight
from harness.callback import note_failure
from harness.config import JobSpec, expand
from harness.console import PlainLines, Progress, in_words, progress, say, say_error
from harness.devices import has_gpu, leased
from harness.errors import UserError
from harness.locations import trace
from harness.plugins import import_catalogue
from harness.results import Summary
from harness.worker import start_server, take_server_start

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def run_jobs(cfg: DictConfig) -> str | tuple[float, ...] | None:
    """What a composed configuration asks for: one paired experiment, alone or as one of a sweep's.

    Returns its results' folder, or in a sweep all of theirs; to a sweeper that searches, and so has a direction, what
    the job costs; nothing where nothing was measured.

    The heavy packages come in once nothing is left that could be refused without them. A mistake ends a single job
    with exit code 2; in a sweep it is noted and the other jobs go on.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    results = Path(HydraConfig.get().sweep.dir if multirun else cfg.results_dir)
    try:
        with plan.taking_part(cfg.job, results) as wanted:
            if not wanted:
                return str(results)
            spec = one_job(cfg)
            warnings = preflight.look(spec.config)
            if cfg.dry_run:
                say(f"{spec.combo} against {spec.against}, about {in_words(plan.expected_s(spec))}: not measured.")
                return _returned(results, None)
            for warning in warnings if cfg.job is None else []:  # a sweeper has told them of all its jobs
                say(f"Note: {warning}.")
            summary = run_job(spec, results, cfg.job)
        return _returned(results if multirun else results / summary.run_id, summary)
    except UserError as error:
        if not multirun:
            say_error(str(error))
            raise SystemExit(2) from None
        note_failure(results, _name(cfg), str(error))
    except Exception as error:  # in a sweep it is shown and kept, and the other jobs go on
        if not multirun:
            raise
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        note_failure(results, _name(cfg), f"{error}: make room" if full else trace())
    return _returned(results, None)


def _name(cfg: DictConfig) -> str:
    return str(cfg.job.label if cfg.job else cfg.combo)


def one_job(cfg: DictConfig) -> JobSpec:
    """Raises UserError for a design, whose many jobs are a sweeper's."""
    specs = expand(cfg)
    if len(specs) > 1:
        raise UserError(f"sweep={cfg.sweep} has {len(specs)} jobs, which hydra/sweeper=designs runs: leave it as it is")
    return specs[0]


def _returned(results: Path, summary: Summary | None) -> str | tuple[float, ...] | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN and "direction" in HydraConfig.get().sweeper:
        from harness.report.choice import objectives

        return objectives(summary)
    return str(results)


def create(spec: JobSpec) -> None:
    """Create every optimization once, here, so that one that its parameters do not suit is refused at once."""
    catalogue = import_catalogue(spec.config["plugin_modules"])
    for name, params in {**spec.toggles, **spec.against_toggles}.items():
        catalogue.create(name, params)


def run_job(spec: JobSpec, results: Path, part: DictConfig | None = None) -> Summary:
    """Run one experiment, showing how far it is; say what it is about before, and where its time went after.

    `part` is what the sweeper said of it where it is a part of a sweep: its `number`, of how many, and the like.
    Waits first until a device is free, so that a job that waits does nothing beside the one that is timed.
    """
    device = spec.config["device"]
    if device == "auto":
        device = "cuda" if has_gpu(device) else "cpu"
    tell = say if plan.prints(part) else _silent
    asked = time.monotonic()
    with leased(device, lambda: tell(f"{spec.combo} waits until no other job measures on {device}.")):
        waited_s = time.monotonic() - asked
        tell(announcement(spec, part))
        start_server()  # its imports take as long as this process's own, and run beside them
        create(spec)
        from harness import job  # with PyTorch, transformers and chatterbox: half a minute in a new environment

        started = take_server_start()
        if started is not None and started < asked:
            started += waited_s
        with showing(spec, results, part) as show:
            summary = job.run(spec, results, show, started, device)
    tell(time_line(summary.timing))
    tell(start_line(summary))
    return summary


def _silent(text: str) -> None:
    """What a job in another process says while the command draws a board, which it would write into."""


@contextmanager
def showing(spec: JobSpec, results: Path, part: DictConfig | None) -> Iterator[Progress]:
    """Shows how far a job is: alone with a bar or plain lines, in a sweep on its board or with lines that name it."""
    if part is None:
        with progress() as show:
            yield show
    elif part.on_board:
        with board.note(results, part.key, spec.combo) as show:
            yield show
    else:
        plain = PlainLines()
        yield lambda phase, done, total: plain(f"{spec.combo}: {phase}", done, total)


def announcement(spec: JobSpec, part: DictConfig | None) -> str:
    settings = spec.config
    place = f"Job {part.number} of {part.of}. " if part else ""
    return (
        f"{place}Measuring {spec.combo} ({', '.join(spec.toggles) or 'nothing switched on'}) "
        f"against the {spec.against}: "
        f"pipeline {settings['pipeline']['name']}, workload {settings['workload']['name']}, "
        f"device {settings['device']}. About {in_words(plan.expected_s(spec))} where speech is made in real time."
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
