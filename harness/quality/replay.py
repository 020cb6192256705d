"""A pipeline's stages, one by one, given the reference's own inputs: what `harness.quality.fidelity` compares.

The reference speaks a few texts and keeps what went from stage to stage (`Inputs`). Then both pipelines, the reference
too, take each stage by itself: T3 made to say those tokens, the flow with those tokens and the same seed, the vocoder
with that mel, the watermark with that wave. All texts go through a stage in one call, so that a batch is a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.pipeline import Pipeline, Segment, SynthesisError, Teacher
from harness.quality.fidelity import Trace
from harness.quality.watermark import create_detector

OTHER_SEED = 1
"""How far away the seed of the wave is that tells what chance does."""


@dataclass(frozen=True)
class Case:
    """A text for the comparison. `n_tokens` pins its number of speech tokens; None lets the reference stop itself."""

    text_id: str
    text: str
    voice: str
    n_tokens: int | None = None
    language: str | None = None


@dataclass(frozen=True)
class Inputs:
    """What went from stage to stage when the reference spoke one text."""

    tokens: NDArray[np.int64]  # [n]
    mel: NDArray[np.float32]  # [80, T]
    wave: NDArray[np.float32]  # [samples], without the mark


def record(
    pipeline: Pipeline,
    cases: Sequence[Case],
    seed: int,
    given: Sequence[Inputs] = (),
    since: str = "generate_tokens",
) -> list[Inputs]:
    """Speak the cases, without splitting their texts, and keep what went from stage to stage.

    From the stage `since` on; what comes before it is `given`. Raises SynthesisError as `Pipeline.synthesize` does.
    """
    device = pipeline.device
    voices = [_stage(pipeline, "condition", seed, case.voice) for case in cases]
    tokens = [torch.from_numpy(kept.tokens).to(device) for kept in given]
    mels = [torch.from_numpy(kept.mel).to(device)[None] for kept in given]
    if since == "generate_tokens":
        segments = [
            Segment(case.text, voice, i, case.n_tokens, language=case.language)
            for i, (case, voice) in enumerate(zip(cases, voices, strict=True))
        ]
        tokens = _stage(pipeline, "generate_tokens", seed, segments)
        if any(len(row) == 0 for row in tokens):
            raise SynthesisError("T3 emitted its stop token first: there is no speech token to vocode")
    if since != "mel_to_wave":
        mels = _stage(pipeline, "tokens_to_mel", seed, tokens, voices)
    waves = _stage(pipeline, "mel_to_wave", seed, mels)
    return [
        Inputs(row.cpu().numpy(), _array(mel[0]), _array(wave))
        for row, mel, wave in zip(tokens, mels, waves, strict=True)
    ]


def replay(pipeline: Pipeline, cases: Sequence[Case], inputs: Sequence[Inputs], seed: int) -> list[Trace]:
    """What each stage makes of the reference's inputs, a trace for each case."""
    device = pipeline.device
    voices = [_stage(pipeline, "condition", seed, case.voice) for case in cases]
    tokens = [torch.from_numpy(kept.tokens).to(device) for kept in inputs]
    mels = [torch.from_numpy(kept.mel).to(device)[None] for kept in inputs]
    waves = [torch.from_numpy(kept.wave).to(device) for kept in inputs]
    logits = teach(pipeline, cases, inputs, seed)
    spoken = _stage(pipeline, "tokens_to_mel", seed, tokens, voices)
    vocoded = _stage(pipeline, "mel_to_wave", seed, mels)
    chance = _stage(pipeline, "mel_to_wave", seed + OTHER_SEED, mels)
    marked = _stage(pipeline, "watermark", seed, waves)
    detector = create_detector()
    return [
        Trace(
            logits=logits[i],
            mel=_array(spoken[i][0]),
            wave=_array(vocoded[i]),
            chance=_array(chance[i]),
            marked=marked[i],
            mark=None if detector is None else detector.read(marked[i], pipeline.model.sr),
        )
        for i in range(len(cases))
    ]


def teach(
    pipeline: Pipeline, cases: Sequence[Case], inputs: Sequence[Inputs], seed: int
) -> list[NDArray[np.float32] | None]:
    """Guided logits [n, V] at each of the recorded tokens; None from a loop that does not listen to a teacher."""
    voices = [_stage(pipeline, "condition", seed, case.voice) for case in cases]
    teachers = [Teacher(torch.from_numpy(kept.tokens).to(pipeline.device)) for kept in inputs]
    segments = [
        Segment(case.text, voice, i, len(teacher.tokens), teacher, case.language)
        for i, (case, voice, teacher) in enumerate(zip(cases, voices, teachers, strict=True))
    ]
    _stage(pipeline, "generate_tokens", seed, segments)
    return [
        torch.stack(teacher.logits).cpu().numpy() if len(teacher.logits) == len(teacher.tokens) else None
        for teacher in teachers
    ]


def _stage(pipeline: Pipeline, name: str, seed: int, *arguments: Any) -> Any:
    """One stage by itself, as `synthesize` calls it."""
    torch.manual_seed(seed)
    with ExitStack() as contexts:
        for context in pipeline.around:
            contexts.enter_context(context())
        if name != "condition":
            contexts.enter_context(torch.inference_mode())
        result = pipeline.stages[name](*arguments)
        for hook in pipeline.between:
            hook(name)
    return result


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


# -- files -----------------------------------------------------------------------------------------------------------


def save(path: Path, items: Sequence[Inputs] | Sequence[Trace]) -> None:
    """Arrays and numbers of all items in one file; what is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"n": len(items)}
    for i, item in enumerate(items):
        arrays |= {f"{i}.{name}": value for name, value in vars(item).items() if value is not None}
    np.savez(path, **arrays)


def load(path: Path, kind: type) -> list[Any]:
    """What `save` wrote: `kind` is Inputs or Trace."""
    with np.load(path) as file:
        found: list[dict[str, Any]] = [{} for _ in range(int(file["n"]))]
        for i, item in enumerate(found):
            for field in fields(kind):
                if (name := f"{i}.{field.name}") in file:
                    value = file[name]
                    item[field.name] = value if value.ndim else float(value)
    return [kind(**item) for item in found]
