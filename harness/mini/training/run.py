"""What a training stage needs to know about the run it is part of: where, on what, how long; and its log."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass
class Run:
    """One training run of the miniature.

    `scale` multiplies every stage's number of steps: 1.0 is the full recipe, a small value tries the code.
    """

    folder: Path
    device: str = "cuda"
    seed: int = 0
    scale: float = 1.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self, full: int) -> int:
        """The number of optimizer steps that stands for `full` steps of the full recipe; at least 2."""
        return max(2, round(full * self.scale))

    def log(self, stage: str, step: int, **figures: float) -> None:
        """Print one line of progress and append it to <folder>/<stage>.jsonl."""
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 1)}
        row |= {name: round(float(value), 5) for name, value in figures.items()}
        with (self.folder / f"{stage}.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{stage:>10}", *(f"{name}={value:g}" for name, value in row.items()), flush=True)

    def path(self, stage: str) -> Path:
        """Where a finished stage's weights stand."""
        return self.folder / f"{stage}.safetensors"

    def save(self, stage: str, state: dict[str, Tensor]) -> None:
        """Write a stage's weights; also used in the middle of a stage, so that a cut-off run keeps them."""
        temporary = self.path(stage).with_suffix(".tmp")
        save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, temporary)
        temporary.replace(self.path(stage))

    def load(self, stage: str) -> dict[str, Tensor]:
        """A finished stage's weights."""
        return load_file(self.path(stage))

    def resume(self, stage: str, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> int:
        """Restore an interrupted stage from its checkpoint and return the next step; 0 if there is none."""
        checkpoint = self._checkpoint(stage)
        if not checkpoint.exists():
            return 0
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        for name, part in (modules | optimizers).items():
            part.load_state_dict(state[name])
        return state["step"]

    def checkpoint(
        self,
        stage: str,
        step: int,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
    ) -> None:
        """Keep everything that `resume` needs; `step` is the next one to run."""
        state = {name: part.state_dict() for name, part in (modules | optimizers).items()}
        temporary = self._checkpoint(stage).with_suffix(".tmp")
        torch.save(state | {"step": step}, temporary)
        temporary.replace(self._checkpoint(stage))

    def finish(self, stage: str, figures: dict[str, float]) -> None:
        """Mark a stage as done with its validation figures."""
        (self.folder / f"{stage}.done.json").write_text(json.dumps(figures, indent=1))
        self._checkpoint(stage).unlink(missing_ok=True)

    def finished(self, stage: str) -> dict[str, float] | None:
        """The validation figures of a stage that is done; None otherwise."""
        done = self.folder / f"{stage}.done.json"
        return json.loads(done.read_text()) if done.exists() else None

    def _checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.checkpoint.pt"


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, floor: float = 0.02) -> float:
    """Linear warm-up, a constant first half, then a cosine down to `floor` of the peak."""
    warm = min(1.0, (step + 1) / min(warmup, max(1, steps // 10)))
    half = steps / 2
    late = min(1.0, max(0.0, (step - half) / half))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * late)).item())
    return peak * warm * (floor + (1 - floor) * cosine)
