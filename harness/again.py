"""A run's job, measured again for the gate: `python -m harness gate` asks for it where something is undecided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omegaconf import OmegaConf

from harness import environment
from harness.config import expand
from harness.errors import UserError
from harness.gate.repeats import REPEATS, next_job
from harness.results import RunFolder
from harness.sweep import run_job


def measure_again(runs: Sequence[RunFolder], subjects: Iterable[str]) -> RunFolder:
    """One more repetition of the first of the runs, with fresh seeds, into its own folder.

    Raises UserError where it cannot be the same experiment: another commit, another device, no configuration kept.
    """
    first = runs[0]
    measured_at = first.read_json("environment.json").get("git")
    if (here := environment.git()) != measured_at:
        raise UserError(f"{first.run_id} was measured at {_commit(measured_at)}, and this code is {_commit(here)}")
    if not first.job():
        raise UserError(f"{first.path} holds no job.yaml, so its job cannot be measured again")
    config = next_job([run.job() for run in runs], subjects)
    (spec,) = expand(OmegaConf.create({**config, "sweep": None}))
    summary = run_job(spec, first.path / REPEATS)
    return RunFolder.open(first.path / REPEATS / summary.run_id)


def _commit(record: dict[str, object] | None) -> str:
    if not record:
        return "an unknown commit"
    return f"commit {str(record.get('commit'))[:12]}{' with local changes' if record.get('dirty') else ''}"
