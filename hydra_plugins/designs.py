"""The sweeper that runs this project's sweeps; Hydra finds plugins in this namespace alone.

It expands a design (`+sweep=leave_one_out`) or choices (`-m '+combo=glob(*)'`) into jobs, writes them down as a plan,
and hands those that are not measured yet to whichever launcher was asked for: one after the other by default,
`hydra/launcher=joblib`, `ray` or `submitit_slurm` side by side. What a plan is, and how a sweep goes on where it was
ended, is `harness.plan`'s.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from harness import plan
from harness.board import board, is_shown
from harness.callback import note_failure
from harness.console import say, say_error
from harness.devices import count_devices, has_gpu
from harness.errors import UserError


class DesignSweeper(BasicSweeper):
    """Hydra's basic sweeper with a plan."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        with read_write(config), open_dict(config):
            give_devices(config.hydra.launcher, str(config.device))
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Raises UserError for a sweep with nothing to measure in it, or whose folder another one holds."""
        assert self.config is not None
        assert self.hydra_context is not None
        config, loader = self.config, self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*self._parse_config(), *arguments])
        (choices,) = self.split_arguments(parsed, None)

        def compose(overrides: list[str]) -> DictConfig:
            """What a job would be given: all but Hydra's own settings."""
            composed = loader.load_sweep_config(config, overrides)
            return OmegaConf.masked_copy(composed, [str(name) for name in composed if name != "hydra"])

        jobs, refused = plan.jobs_of(compose, choices, here=not is_elsewhere(config.hydra.launcher))
        folder = plan.folder_for(
            jobs,
            results=Path(config.results_dir),
            named=Path(config.hydra.sweep.dir) if names_folder(config) else None,
            name=str(config.sweep or "multirun"),
        )
        with read_write(config):
            config.hydra.sweep.dir = str(folder)
        if config.dry_run:
            for line in plan.lines(folder, jobs):
                say(line)
            return []
        try:
            with plan.held(folder):
                plan.write(folder, jobs)
                plan.wait_for_leftovers(folder)
                done = plan.done(folder)
                plan.clear_leftovers(folder, jobs)
                for words in refused:
                    note_failure(folder, *words)
                with board(folder, sum(job.key in done for job in jobs), len(jobs)):
                    return self._launch(folder, jobs, done)
        except OSError as error:  # of the folder, not of a job
            raise UserError(
                f"cannot write into {folder} ({error.strerror}): make room, or name another folder"
            ) from error

    def _launch(self, folder: Path, jobs: Sequence[plan.Planned], done: Mapping[str, Path]) -> Any:
        say(plan.opening_line(folder, jobs, done))
        overrides = [
            job.launched(folder, number, len(jobs), is_shown())
            for number, job in enumerate(jobs, start=1)
            if job.key not in done
        ]
        assert self.launcher is not None
        try:
            return self.launcher.launch(overrides, initial_job_idx=0) if overrides else []
        except Exception:  # of a launcher, one of whose processes was killed; what is measured is in the folder
            say_error(traceback.format_exc())
            return []


def give_devices(launcher: DictConfig, device: str) -> None:
    """Of a launcher that runs jobs side by side, as many at once as there are devices; of a scheduler, a GPU for each.

    Raises UserError where a scheduler chooses the GPU and the command does, too.
    """
    if "n_jobs" in launcher:
        devices, asked = count_devices(device), launcher.n_jobs
        launcher.n_jobs = devices if asked is None or asked < 1 else min(asked, devices)
        launcher.pre_dispatch = "n_jobs"  # what is not begun is not lost with a process
    if not ("ray" in launcher or "gpus_per_node" in launcher) or not has_gpu(device):
        return
    if device.startswith("cuda:"):
        raise UserError(f"device={device}: this launcher chooses the GPU of each job; say device=cuda")
    if "ray" in launcher:
        launcher.ray.remote.setdefault("num_gpus", 1)
    elif launcher.gpus_per_node is None and not launcher.get("gres"):
        launcher.gpus_per_node = 1


def is_elsewhere(launcher: DictConfig) -> bool:
    """Whether a launcher starts jobs on hosts whose devices cannot be seen from here."""
    return "gpus_per_node" in launcher or (
        "ray" in launcher and launcher.ray.get("init", {}).get("address") is not None
    )


def names_folder(config: DictConfig) -> bool:
    """Whether the command says where the sweep goes."""
    return any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
