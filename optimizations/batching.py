"""Segments of one utterance, or of many, go through every stage side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from chatterbox.tts import Conditionals
from torch import Tensor

from harness.pipeline import Pipeline, Stage
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.flow.batched import SOLVER_ROWS, solve
from optimizations.flow.prefix import noise_for, prompt_of
from optimizations.flow.steps import euler_steps
from optimizations.t3.decoder import decoder_of
from optimizations.vocoder.batched import HIFT_ROWS, decode, source

PROBE_TOKENS = (24, 40)


@register
class Batching(Optimization):
    """All segments of a call in batches, through T3, flow and vocoder.

    Baseline: one segment after the other. A decoding step reads all of T3's weights for two rows, and a GPU that could
    do hundreds at once waits for memory and for launches.

    This: segments are sorted by length and go through each stage `size` at a time, whichever utterance they belong to.
    T3's decoder has the batch size as a setting, which `token_sequence` sets as well; where both are on, this one's
    counts. Flow and vocoder take at most so many as fill a GPU, 16 and 8: their memory grows with the rows, and fewer
    are padded less. They are called here, in such a way that a row comes out as it would alone:
    - flow: rows are padded behind and masked. Its encoder looks three tokens ahead, where a row alone sees zeros, so
      padding is zeroed there too; prompts may differ in length; each row starts from the noise it would draw alone.
    - vocoder: the source is made row by row, with the row's own random phases, and decoded together. Where lengths
      differ, a row's last frames are decoded once more among other rows' last frames, so that they meet the edge
      that they would meet alone; HiFT's convolutions do not reach further than 16 frames.
    The watermark is batched by `gpu_watermark`; what is called here in shapes that come back, `cuda_graphs` captures.

    Where it cannot help: one segment at a time, of which T3's loop is this project's (`alignment_analyzer` is that loop
    alone) and all else upstream's. Padding is work for nothing, and memory grows with `size`. T3's sampling draws for
    the batch: other tokens than alone, of the same distribution; greedy decoding gives the same.

    The campaign had nothing of the kind: its splitting of texts spoke the pieces in turn.

    Evidence: batch sizes by stage, the share of padding, and the relative error of a row in a batch against the same
    row alone, mel and wave, in a probe.
    """

    name = "batching"
    extra = True
    lossless = False

    @dataclass
    class Config:
        """`size`: segments side by side, at most."""

        size: int = number(16, least=1)

    config: Config

    def apply(self, pipeline: Pipeline) -> None:
        size = self.config.size
        self._decoder = decoder_of(pipeline, self.name)
        pipeline.swap(self._decoder, "batch_size", size)
        self._flow = BatchedFlow(pipeline, pipeline.stages["tokens_to_mel"], size)
        pipeline.wrap_stage("tokens_to_mel", lambda _alone: self._flow)
        self._vocoder = BatchedHiFT(pipeline, pipeline.stages["mel_to_wave"], size)
        self._other_vocoder = pipeline.replaced_by.get("mel_to_wave")  # vocos has its own way with several mels
        if not self._other_vocoder:
            pipeline.wrap_stage("mel_to_wave", lambda _alone: self._vocoder)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        facts: dict[str, Any] = {
            "batches_by_size": {
                "generate_tokens": _by_size(self._decoder.batches),
                "tokens_to_mel": _by_size(self._flow.tally.sizes),
                "mel_to_wave": _by_size(self._vocoder.tally.sizes),
            },
            "padding_share": {
                "tokens_to_mel": self._flow.tally.padding_share,
                "mel_to_wave": self._vocoder.tally.padding_share,
            },
        }
        if not any(n > 1 for n in self._flow.tally.sizes):
            reason = "no call had more than one segment: try workload.scenario=offline, or token_sequence on long texts"
            return Evidence(False, facts, reason)
        facts["row_against_alone_relative_error"] = self._compare(pipeline)
        return Evidence(True, facts)

    def _compare(self, pipeline: Pipeline) -> dict[str, float]:
        """Two rows of different length together, against each alone, from the same noise and the same sources."""
        voice = next(iter(pipeline.voices.values()))
        prompt = voice.gen["prompt_token"][0].long().to(pipeline.device)
        tokens, voices = [prompt.repeat(n)[:n] for n in PROBE_TOKENS], [voice] * len(PROBE_TOKENS)
        flow = BatchedFlow(pipeline, self._flow.alone, size=len(tokens))
        devices = [pipeline.device] if pipeline.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            mels = flow.alone(tokens, voices)
            torch.manual_seed(0)
            errors = {"mel": _relative_error(flow.together(tokens, voices), mels)}
            if not self._other_vocoder:
                hift = pipeline.model.s3gen.mel2wav
                sources = [source(hift, mel) for mel in mels]
                waves = [hift.decode(x=mel, s=excitation)[0] for mel, excitation in zip(mels, sources, strict=True)]
                errors["wave"] = _relative_error(decode(hift.decode, mels, sources), waves)
        return errors


# -- batches -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a stage was given: rows by batch, and frames by whether anybody asked for them."""

    sizes: list[int] = field(default_factory=list)
    n_frames: int = 0
    n_padding: int = 0

    def count(self, lengths: Sequence[int]) -> None:
        """One batch, its rows' lengths in frames."""
        self.sizes.append(len(lengths))
        self.n_frames += sum(lengths)
        self.n_padding += len(lengths) * max(lengths) - sum(lengths)

    @property
    def padding_share(self) -> float:
        """Of all frames that were computed."""
        computed = self.n_frames + self.n_padding
        return round(self.n_padding / computed, 4) if computed else 0.0


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of rows by batch: neighbours in length go together, so that little is padded.

    >>> batches([3, 9, 4, 8], size=2)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[first : first + size] for first in range(0, len(order), size)]


def _by_size(sizes: Sequence[int]) -> dict[str, int]:
    return {str(size): count for size, count in sorted(Counter(sizes).items())}


class BatchedStage:
    """Several rows take `together`, one takes the stage that was there, with whatever other plugins made of it."""

    def __init__(self, pipeline: Pipeline, alone: Stage, size: int) -> None:
        self.pipeline, self.alone, self.size = pipeline, alone, size
        self.tally = Tally()

    @torch.inference_mode()
    def __call__(self, rows: list[Tensor], *others: Any) -> list[Tensor]:
        if len(rows) == 1 or self.size == 1:
            return self.alone(rows, *others)
        return self.together(rows, *others)

    def together(self, rows: list[Tensor], *others: Any) -> list[Tensor]:
        raise NotImplementedError


# -- flow ----------------------------------------------------------------------------------------------------------


class BatchedFlow(BatchedStage):
    """Speech tokens [n] and their voices -> mels [1, 80, 2 n]."""

    @torch.inference_mode()
    def together(self, rows: list[Tensor], voices: list[Conditionals]) -> list[Tensor]:
        s3gen, device = self.pipeline.model.s3gen, self.pipeline.device
        flow, steps = s3gen.flow, euler_steps(self.pipeline)
        prompts = [prompt_of(voice, device, s3gen.dtype) for voice in voices]
        ids = [torch.cat((prompt.tokens, row.long())) for prompt, row in zip(prompts, rows, strict=True)]
        frames = [flow.token_mel_ratio * len(row) for row in ids]
        # As many draws as rows, in the rows' order: the numbers that each would get alone.
        noises = [noise_for(s3gen, n, len(prompt.mel), device)[0] for n, prompt in zip(frames, prompts, strict=True)]
        mels: dict[int, Tensor] = {}
        for batch in batches(frames, min(self.size, SOLVER_ROWS)):
            self.tally.count([frames[i] for i in batch])
            solved = solve(
                flow, [ids[i] for i in batch], [prompts[i] for i in batch], [noises[i] for i in batch], steps
            )
            for i, mel in zip(batch, solved, strict=True):
                mels[i] = mel[None, :, len(prompts[i].mel) : frames[i]].to(s3gen.dtype)
        return [mels[i] for i in range(len(rows))]


# -- vocoder -------------------------------------------------------------------------------------------------------


class BatchedHiFT(BatchedStage):
    """Mels [1, 80, n] -> waves [480 n], their first 20 ms silenced as upstream does."""

    @torch.inference_mode()
    def together(self, rows: list[Tensor]) -> list[Tensor]:
        s3gen = self.pipeline.model.s3gen
        sources = [source(s3gen.mel2wav, mel) for mel in rows]
        frames = [mel.shape[2] for mel in rows]
        waves: dict[int, Tensor] = {}
        for batch in batches(frames, min(self.size, HIFT_ROWS)):
            self.tally.count([frames[i] for i in batch])
            decoded = decode(s3gen.mel2wav.decode, [rows[i] for i in batch], [sources[i] for i in batch])
            waves.update(zip(batch, decoded, strict=True))
        for wave in waves.values():
            wave[: len(s3gen.trim_fade)] *= s3gen.trim_fade
        return [waves[i] for i in range(len(rows))]


def _relative_error(rows: list[Tensor], expected: list[Tensor]) -> float:
    """The largest over the rows."""
    errors = ((a - b).norm() / b.norm() for a, b in zip(rows, expected, strict=True))
    return max(float(error) for error in errors)
