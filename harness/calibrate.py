"""At what fidelity words or voice begin to suffer: `python -m harness.calibrate --out curve.jsonl`.

The miniature's stages are damaged by growing amounts: fewer steps of the flow's solver, noise on weights, weights in
fewer bits. Each damage is compared stage by stage (`fidelity`), and spoken and heard against the unharmed pipeline. The
curve, a row a damage, shows where word error rate or similarity starts to move; `limits` reads it off, for
`fidelity.LIMITS`.

Each damage speaks every clip and hears it. A file that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoints, stats
from harness.locations import ROOT
from harness.pipeline import Pipeline, SynthesisError
from harness.quality.fidelity import LIMITS, compare, summarize
from harness.quality.replay import Case, record, replay
from harness.quality.scoring import MIN_VOICE_S, create_judges, reference_wave
from harness.quality.speaker import SAMPLE_RATE, similarity, voice_in
from harness.quality.words import word_errors
from harness.results import append_row, finite, read_rows

SENTENCES = ROOT / "tests/data/held_out_sentences.txt"
STEPS = (8, 6, 5, 4, 3, 2, 1)
NOISES = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3)
BITS = (8, 7, 6, 5, 4, 3)
SEED = 0


# -- damages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Something done to one stage. A larger `size` is not always worse: of bits and steps fewer are."""

    family: str
    size: float
    stage: str
    inflict: Callable[[Pipeline], None]


def damages() -> Iterator[Damage]:
    """All of them, the smallest of a family first."""
    for steps in STEPS:
        yield Damage("flow_steps", steps, "tokens_to_mel", partial(take_steps, steps=steps))
    for name, stage, part in (
        ("t3", "generate_tokens", lambda pipeline: pipeline.model.t3.tfmr),
        ("flow", "tokens_to_mel", lambda pipeline: pipeline.model.s3gen.flow.decoder),
        ("vocoder", "mel_to_wave", lambda pipeline: pipeline.model.s3gen.mel2wav),
    ):
        for noise in NOISES:
            yield Damage(f"{name}_noise", noise, stage, partial(_change, part=part, to=partial(noisy, amount=noise)))
        for bits in BITS:
            yield Damage(f"{name}_bits", bits, stage, partial(_change, part=part, to=partial(rounded, bits=bits)))


def take_steps(pipeline: Pipeline, steps: int) -> None:
    """Fewer steps of the flow's solver than the ten that upstream takes."""
    pipeline.wrap(pipeline.model.s3gen, "flow_inference", lambda solve: partial(solve, n_cfm_timesteps=steps))


def _change(pipeline: Pipeline, part: Callable[[Pipeline], nn.Module], to: Callable[[Tensor], Tensor]) -> None:
    """Every matrix and kernel of a part of the model becomes another."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(SEED)
    for weight in part(pipeline).parameters():
        if weight.ndim > 1 and weight[0].numel() > 1:
            pipeline.swap(weight, "data", to(weight.data))
    torch.random.set_rng_state(generator)


def noisy(weight: Tensor, amount: float) -> Tensor:
    """With normal noise, `amount` times the weight's own standard deviation."""
    return weight + amount * weight.std() * torch.randn_like(weight)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """In so many bits with one scale for each output, and back."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return ((rows / scale).round() * scale).view_as(weight)


# -- the curve -------------------------------------------------------------------------------------------------------


class Listener:
    """Speaks and hears with one pipeline, the same clips every time."""

    def __init__(self, pipeline: Pipeline, sentences: Sequence[str], seeds: Sequence[int]) -> None:
        self.pipeline, self.judges = pipeline, create_judges({})
        voices = sorted(pipeline.voices)
        self.cases = [Case(f"s{i}", text, voices[i % len(voices)]) for i, text in enumerate(sentences)]
        self.seeds = seeds
        clips = {voice: reference_wave(voice) for voice in voices}
        self.references = {v: self.judges.encoder.embed(voice_in(*clip)) for v, clip in clips.items() if clip}
        self.inputs = record(pipeline, self.cases, SEED)
        self.traces = replay(pipeline, self.cases, self.inputs, SEED)
        self.unharmed = list(self.hear())

    def row(self, damage: Damage) -> dict[str, Any]:
        """A damage's place on the curve: fidelity by stage, and what it did to words and voice."""
        damage.inflict(self.pipeline)
        try:
            traces = replay(self.pipeline, self.cases, self.inputs, SEED)
            heard = list(self.hear())
        finally:
            self.pipeline.reset()
        texts = [case.text_id for case in self.cases]
        found = summarize([compare(*pair) for pair in zip(self.traces, traces, strict=True)], texts)
        clips = [case.text_id for case, _ in product(self.cases, self.seeds)]
        return {
            "family": damage.family,
            "size": damage.size,
            "stage": damage.stage,
            "fidelity": {stage: of["figures"] for stage, of in found.items()},
            **{name: self._moved(i, heard, clips) for i, name in enumerate(("wer", "similarity"))},
        }

    def hear(self) -> Iterator[tuple[float, float]]:
        """Word error rate and similarity of each clip; 1 and 0 where nothing was said."""
        for case, seed in product(self.cases, self.seeds):
            try:
                said = self.pipeline.synthesize(case.text, case.voice, seed)
            except SynthesisError:
                yield 1.0, 0.0
                continue
            voice = voice_in(said.wave, said.sample_rate)
            close = 0.0
            if len(voice) >= MIN_VOICE_S * SAMPLE_RATE:
                close = similarity(self.judges.encoder.embed(voice), self.references[case.voice])
            heard = self.judges.transcriber.transcribe(said.wave, said.sample_rate)
            yield word_errors(case.text, heard)["wer"], close

    def _moved(self, axis: int, heard: Sequence[tuple[float, float]], clips: Sequence[str]) -> dict[str, float | None]:
        before, after = ([clip[axis] for clip in side] for side in (self.unharmed, heard))
        interval = stats.mean_delta(before, after, clips)
        return {"delta": interval.estimate, "low": interval.low, "high": interval.high}


# -- reading it off --------------------------------------------------------------------------------------------------


def limits(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By stage and figure, the largest amount that harmed neither words nor voice, below all that did.

    Of the damages to that stage alone. Harmed is what got worse by more than counts, with the whole interval; unharmed,
    what is proved not to have. None where no damage was small enough.
    """
    found: dict[str, dict[str, float | None]] = {}
    for stage, names in LIMITS.items():
        own = [row for row in rows if row["stage"] == stage]
        found[stage] = {}
        for name in names:
            amounts = [(_amount(row, name), row) for row in own]
            ceiling = min((amount for amount, row in amounts if _harm(row) == "harmed"), default=math.inf)
            below = [amount for amount, row in amounts if amount < ceiling and _harm(row) == "unharmed"]
            found[stage][name] = max(below, default=None)
    return found


def _amount(row: dict[str, Any], name: str) -> float:
    figure = row["fidelity"][row["stage"]].get(name) or {}
    return math.inf if figure.get("mean") is None else figure["mean"]


def _harm(row: dict[str, Any]) -> str:
    """ "harmed", "unharmed", or "" where nobody can tell."""
    axes = [(row["wer"], stats.METRICS["wer"]), (row["similarity"], stats.SIMILARITY)]
    verdicts = [stats.verdict(moved["low"], moved["high"], metric.threshold, metric) for moved, metric in axes]
    if "worse" in verdicts:
        return "harmed"
    proved = [stats.proves_no_worse(moved["low"], moved["high"], metric.threshold, metric) for moved, metric in axes]
    return "unharmed" if all(proved) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.calibrate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the curve, a row a damage")
    parser.add_argument("--sentences", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--families", nargs="*", help="such as flow_steps, t3_noise, vocoder_bits (default: all)")
    options = parser.parse_args(arguments)
    rows, _ = read_rows(options.out)
    known = {(row["family"], row["size"]) for row in rows}
    wanted = [d for d in damages() if not options.families or d.family in options.families]
    missing = [damage for damage in wanted if (damage.family, damage.size) not in known]
    if missing:
        sentences = SENTENCES.read_text(encoding="utf-8").splitlines()[: options.sentences]
        listener = Listener(checkpoints.load("mini", "cpu"), sentences, range(1, options.seeds + 1))
        for damage in missing:
            append_row(options.out, finite(listener.row(damage)))
            print(f"{damage.family} {damage.size:g}", flush=True)
    print(json.dumps(limits(read_rows(options.out)[0]), indent=2))


if __name__ == "__main__":
    main()
