"""At what fidelity words or voice begin to suffer: `python -m harness.calibrate --out FOLDER`.

The miniature's stages are damaged by growing amounts: fewer steps of the flow's solver, noise on weights, weights in
fewer bits. Each damage is compared with the unharmed stage (`fidelity`), and what is spoken with it is heard. The curve
shows where word error rate or similarity starts to move; `limits` reads it off, for `fidelity.LIMITS`.

    clips.jsonl   one row for each clip: its damage, text and seed, its words and voice, and the stage's fidelity to it
    curve.json    one entry for each damage, with intervals over texts, and the limits that follow
    curve.png     the same as a picture

A damage to the flow or the vocoder leaves the words of T3 as they are, so those are spoken once. A damage to T3 makes
every text another draw, which takes more clips to tell from chance, so it has two seeds. Two hours of one core, or
four minutes of thirty-two: every text and stage is a piece of work of its own, for as many processes as there are
cores. A folder that is there is gone on with, and what is known so far is read off.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import checkpoints, stats
from harness.locations import HELD_OUT
from harness.pipeline import Pipeline, SynthesisError
from harness.quality.fidelity import LIMITS, Trace, compare
from harness.quality.replay import OTHER_SEED, Case, Inputs, record, teach
from harness.quality.scoring import MIN_VOICE_S, Judges, create_judges, reference_wave
from harness.quality.speaker import SAMPLE_RATE, similarity, voice_in
from harness.quality.words import word_errors
from harness.report.curve import draw
from harness.results import append_row, finite, read_rows, write_atomically

STEPS = (8, 6, 4, 3, 2, 1)
NOISES = {
    "t3": (0.03, 0.06, 0.1, 0.2, 0.3, 0.4),
    "flow": (0.01, 0.03, 0.06, 0.1, 0.2),
    "vocoder": (0.003, 0.01, 0.03, 0.06, 0.1, 0.2),
}
BITS = {"t3": (6, 5, 4, 3), "flow": (6, 5, 4, 3), "vocoder": (8, 6, 5, 4, 3)}
SEED = 0
SEEDS = {"generate_tokens": (1, 2), "tokens_to_mel": (1,), "mel_to_wave": (1,)}
HARMED, UNHARMED, UNKNOWN = "harmed", "unharmed", "unknown"
NOTHING = Inputs(np.zeros(0, np.int64), np.zeros((80, 0), np.float32), np.zeros(0, np.float32))
LONGEST = 300
"""Tokens, twelve seconds: a text takes three, and a damaged T3 may find no end."""


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
        for noise in NOISES[name]:
            yield Damage(f"{name}_noise", noise, stage, partial(_change, part=part, to=partial(noisy, amount=noise)))
        for bits in BITS[name]:
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


# -- speaking and hearing --------------------------------------------------------------------------------------------


class Listener:
    """Speaks and hears with one pipeline, whole and damaged."""

    def __init__(self, pipeline: Pipeline, judges: Judges) -> None:
        self.pipeline, self.judges = pipeline, judges
        clips = {voice: reference_wave(voice) for voice in pipeline.voices}
        self.references = {voice: judges.encoder.embed(voice_in(*clip)) for voice, clip in clips.items() if clip}

    def rows(
        self, case: Case, stage: str, seeds: Sequence[int], inflicted: Iterable[Damage]
    ) -> Iterator[dict[str, Any]]:
        """A row for each clip of one text: unharmed with each seed, then with each damage to the stage.

        The stage is compared where the first seed's clip is.
        """
        whole = {seed: record(self.pipeline, [case], seed)[0] for seed in seeds}
        first = whole[seeds[0]]
        reference = self.trace(case, stage, seeds[0], first, first)
        for seed in seeds:
            yield self.row(case, stage, UNHARMED, 0, seed, whole[seed])
        for damage in inflicted:
            damage.inflict(self.pipeline)
            try:
                for seed in seeds:
                    try:
                        (said,) = record(self.pipeline, [case], seed, [whole[seed]], since=stage)
                    except SynthesisError:
                        said = NOTHING
                    found = {}
                    if seed == seeds[0]:
                        found = compare(reference, self.trace(case, stage, seed, first, said))[stage]
                    yield self.row(case, stage, damage.family, damage.size, seed, said) | {"fidelity": found}
            finally:
                self.pipeline.reset()

    def trace(self, case: Case, stage: str, seed: int, whole: Inputs, said: Inputs) -> Trace:
        """What the stage makes of the unharmed pipeline's inputs: a part of what was just said, but for T3's logits."""
        if stage == "generate_tokens":
            return Trace(logits=teach(self.pipeline, [case], [whole], seed)[0])
        if stage == "tokens_to_mel":
            return Trace(mel=said.mel)
        chance = None
        if said is whole:
            chance = record(self.pipeline, [case], seed + OTHER_SEED, [whole], since=stage)[0].wave
        return Trace(wave=said.wave, chance=chance)

    def row(self, case: Case, stage: str, family: str, size: float, seed: int, said: Inputs) -> dict[str, Any]:
        wer, close = self.hear(case, said.wave)
        where = {"text_id": case.text_id, "stage": stage, "family": family, "size": size, "seed": seed}
        return where | {"wer": wer, "similarity": close}

    def hear(self, case: Case, wave: np.ndarray) -> tuple[float, float]:
        """Word error rate and similarity of a clip; 1 and 0 where nothing was said."""
        if not len(wave) or not np.isfinite(wave).all():
            return 1.0, 0.0
        rate = self.pipeline.model.sr
        voice, close = voice_in(wave, rate), 0.0
        if len(voice) >= MIN_VOICE_S * SAMPLE_RATE:
            close = similarity(self.judges.encoder.embed(voice), self.references[case.voice])
        return word_errors(case.text, self.judges.transcriber.transcribe(wave, rate))["wer"], close


@cache
def listener() -> Listener:
    """This process's own."""
    torch.set_num_threads(1)
    pipeline = checkpoints.load("mini", "cpu")
    pipeline.sampling = replace(pipeline.sampling, max_new_tokens=LONGEST)
    return Listener(pipeline, create_judges({}))


def piece(case: Case, stage: str) -> list[dict[str, Any]]:
    """One piece of work: a text, and all damages to a stage."""
    own = [damage for damage in damages() if damage.stage == stage]
    return list(listener().rows(case, stage, SEEDS[stage], own))


def work(
    rows: Sequence[Mapping[str, Any]], sentences: Sequence[str], stages: Sequence[str] = tuple(SEEDS)
) -> list[tuple[Case, str]]:
    """Pieces that have no rows yet; the texts go round the voices."""
    voices = checkpoints.mini.VOICES
    cases = [Case(f"s{i}", text, voices[i % len(voices)]) for i, text in enumerate(sentences)]
    known = {(row["text_id"], row["stage"]) for row in rows}
    return [(case, stage) for case in cases for stage in stages if (case.text_id, stage) not in known]


# -- the curve -------------------------------------------------------------------------------------------------------


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each damage: the stage's fidelity, and what it did to words and voice, paired, over texts."""
    unharmed = {_clip(row): row for row in rows if row["family"] == UNHARMED}
    found = []
    for damage in damages():
        own = [row for row in rows if (row["family"], row["size"]) == (damage.family, damage.size)]
        if not own:
            continue
        texts = [row["text_id"] for row in own]
        before = [unharmed[_clip(row)] for row in own]
        compared = [row for row in own if row["fidelity"]]
        moved = {
            axis: stats.mean_delta([row[axis] for row in before], [row[axis] for row in own], texts)
            for axis in ("wer", "similarity")
        }
        found.append(
            {
                "family": damage.family,
                "size": damage.size,
                "stage": damage.stage,
                "texts": len(set(texts)),
                "clips": len(own),
                "fidelity": {name: _amounts(compared, name) for name in compared[0]["fidelity"]},
                **{axis: _interval(interval) for axis, interval in moved.items()},
            }
        )
    return found


def _clip(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["text_id"], row["stage"], row["seed"]


def _amounts(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """A figure's mean over texts; infinite where it is with one of them, which is stored as null."""
    values = [row["fidelity"][name] for row in rows]
    if None in values:
        return {"mean": math.inf, "low": math.inf, "high": math.inf}
    return _interval(stats.mean(values, [row["text_id"] for row in rows]))


def _interval(interval: stats.Interval) -> dict[str, float | None]:
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}


# -- reading it off --------------------------------------------------------------------------------------------------


def limits(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By stage and figure, the largest amount that harmed neither words nor voice, below all that did.

    Harmed is what got worse by more than counts, with the whole interval; unharmed, what is proved not to have. None
    where no damage was small enough.
    """
    found: dict[str, dict[str, float | None]] = {}
    for stage in SEEDS:
        own = [entry for entry in entries if entry["stage"] == stage]
        found[stage] = {}
        for name in LIMITS[stage]:
            amounts = [(_mean(entry, name), entry) for entry in own]
            ceiling = min((amount for amount, entry in amounts if harm(entry) == HARMED), default=math.inf)
            below = [amount for amount, entry in amounts if amount < ceiling and harm(entry) == UNHARMED]
            found[stage][name] = max(below, default=None)
    return found


def _mean(entry: Mapping[str, Any], name: str) -> float:
    mean = entry["fidelity"][name]["mean"]
    return math.inf if mean is None else mean


def harm(entry: Mapping[str, Any]) -> str:
    """HARMED, UNHARMED, or UNKNOWN where nobody can tell."""
    axes = [(entry["wer"], stats.METRICS["wer"]), (entry["similarity"], stats.SIMILARITY)]
    verdicts = [stats.verdict(moved["low"], moved["high"], metric.threshold, metric) for moved, metric in axes]
    if "worse" in verdicts:
        return HARMED
    proved = [stats.proves_no_worse(moved["low"], moved["high"], metric.threshold, metric) for moved, metric in axes]
    return UNHARMED if all(proved) else UNKNOWN


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m harness.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--sentences", type=int, default=60, help="of the sixty held-out ones")
    parser.add_argument("--stages", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="whose damages (all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    clips = options.out / "clips.jsonl"
    sentences = HELD_OUT.read_text(encoding="utf-8").splitlines()[: options.sentences]
    missing = work(read_rows(clips)[0], sentences, options.stages)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("forkserver")) as pool:
        for number, done in enumerate(as_completed([pool.submit(piece, *one) for one in missing]), start=1):
            for row in done.result():
                append_row(clips, finite(row))
            print(f"{number} of {len(missing)} pieces", flush=True)
    read_off(options.out)


def read_off(folder: Path) -> None:
    """curve.json and curve.png from the clips that are there."""
    entries = curve(read_rows(folder / "clips.jsonl")[0])
    read = limits(entries)
    write_atomically(folder / "curve.json", json.dumps(finite({"limits": read, "curve": entries}), indent=1) + "\n")
    draw(entries, read, list(map(harm, entries)), folder / "curve.png")
    print(json.dumps(finite(read), indent=2))


if __name__ == "__main__":
    main()
