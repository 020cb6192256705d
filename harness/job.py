"""A paired experiment: a reference, which is the baseline or any combo, and one combo, side by side on one device.

Each has a process of its own, and the two take turns; `harness.pair` is what one such pair does. Pairs are repeated,
`measure.processes` of them, for a process is slow or fast as a whole. When the last one has ended, the clips that were
kept are judged, and all that is in the run's folder becomes its summary.

Whatever happens to a child becomes rows and records of the folder. What was measured before, and what the other child
measures after, is kept. What one call speaks, and in which figures the two are compared, is the scenario's
(`harness.scenarios`).

The children are not believed. The clock is this process's; requests cannot be foreseen; every wave is heard here; and
what was written is compared, when the children have ended, with what is there.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch

from harness.config import JobSpec
from harness.console import Progress
from harness.devices import leased
from harness.errors import UserError
from harness.experiment import Experiment
from harness.later import is_later, pack
from harness.ledger import Ledger
from harness.pair import Pair
from harness.quality.scoring import score_run
from harness.results import RunFolder, Summary
from harness.scenarios import scenario
from harness.workload import load_workload


def run(
    spec: JobSpec, results: Path, progress: Progress, started: float | None = None, held: str | None = None
) -> Summary:
    """Measure one combo against its reference and leave a run's folder under `results`, its summary included.

    `started` is when the job's clock began (`time.monotonic`), for a caller that has prepared before, and `held` the
    device that it holds for the job (`harness.devices.leased`). Raises UserError for what a user can put right.
    Whatever it raises, a folder is left only if something was measured.
    """
    device = resolve_device(spec.config["device"])
    workload = load_workload(spec.config["workload"])
    scenario(workload.scenario).check(spec.config["measure"])
    lease = leased(device, lambda: progress(f"waiting until no other job measures on {device}", 0, 0))
    is_held = held is not None and held.startswith(device.partition(":")[0])  # PyTorch may not see the driver's GPU
    with nullcontext() if is_held else lease:
        ledger = Ledger(started)
        folder = RunFolder.create(results, spec.combo, spec.config["pipeline"]["name"])
        folder.write_job(spec.config)
        experiment = Experiment(spec, workload, device, folder, ledger, progress)
        try:
            for number in range(experiment.processes):
                if not Pair(experiment, number).measure():
                    break
                experiment.end_pair()
            experiment.close()
            score(experiment)
        except BaseException:  # a user's mistake, Ctrl-C, or a defect
            experiment.close()
            if experiment.spoken:  # what was measured is kept
                experiment.summarize()
            else:
                shutil.rmtree(folder.path)
            raise
        return experiment.summarize()


def score(experiment: Experiment) -> None:
    """WER and similarity of the clips that were kept; nothing is timed any more, so on all cores."""
    if experiment.speaks:
        experiment.report("scoring")
        with experiment.ledger.book("scoring_s"):
            if is_later(experiment.folder):
                pack(experiment.folder)
            else:
                score_run(experiment.folder, experiment.spec.config["quality"])


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where PyTorch sees one, else cpu. Raises UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or not index):
        raise UserError(f"device={device}: there is auto, cpu, cuda and cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; try device=cpu")
    return device
