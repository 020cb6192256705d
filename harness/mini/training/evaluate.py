"""The miniature's figures: `python -m harness.mini.training.evaluate --damage --out figures.json`.

Every held-out sentence is spoken by every voice with several seeds through the baseline pipeline, and heard again by
a recognizer (word error rate) and a speaker encoder (similarity to a clip that flite spoke in that voice). None of
the three models knows the others, so what they agree on is in the sound.

`--damage` breaks the pipeline on purpose, in ways an optimization might. A quality axis that does not hear these
would not hear an optimization's damage either, so each comes with a paired 95 % interval.

Clips are independent, so they are shared out to worker processes of two threads each: the real-time factor is what
two cores give, as long as the machine has two for every worker.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness import stats
from harness.errors import UserError
from harness.locations import HELD_OUT
from harness.mini import models, vocos
from harness.mini.training import speech
from harness.mini.training.align import quiet
from harness.pipeline import Pipeline, SynthesisError
from harness.quality.asr import PocketsphinxTranscriber
from harness.quality.scoring import read_wave
from harness.quality.signals import flaw
from harness.quality.speaker import ResemblyzerEncoder, similarity, voice_in
from harness.quality.words import word_errors

THREADS = 2

LIMITS = {
    "wer": ("at most", 0.15),
    "wer_worst_voice": ("at most", 0.25),
    "similarity": ("at least", 0.75),
    "nearest_voice": ("at least", 0.95),
    "ended": ("at least", 0.98),
    "speech_rate": ("within", (0.8, 1.2)),
    "rtf": ("below", 1.0),
}
"""What the checkpoint has to reach to be called speaking."""


@dataclass(frozen=True)
class Clip:
    """One thing to say, by which variant of the pipeline; the pairing key is everything but the variant."""

    variant: str
    text: str
    voice: str
    seed: int


@dataclass(frozen=True)
class Heard:
    """What was heard in a clip. A clip that could not be made counts as all words missed."""

    clip: Clip
    wer: float
    similarity: float  # to the voice asked for
    nearest: bool  # whether that voice is the most similar of the four
    ended: bool  # the model emitted its stop token
    audio_s: float
    flite_s: float | None  # the same sentence by flite; None without flite
    generation_time_s: float
    n_tokens: int


# Variants of the pipeline


def with_vocos(pipeline: Pipeline, weights: Path) -> None:
    """The trained Vocos in HiFT's place."""
    vocoder = vocos.load(weights / "vocos.safetensors", pipeline.device)
    fade = pipeline.model.s3gen.trim_fade

    def mel_to_wave(mels: list[Tensor]) -> list[Tensor]:
        waves = [vocoder(mel)[0] for mel in mels]
        for wave in waves:
            wave[: len(fade)] *= fade  # as upstream does behind HiFT
        return waves

    pipeline.replace_stage("mel_to_wave", mel_to_wave, by="vocos")


def with_nf4(pipeline: Pipeline, _weights: Path) -> None:
    """Every linear layer of T3 and the flow rounded to 4-bit NormalFloat and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for module in (*pipeline.model.t3.modules(), *pipeline.model.s3gen.flow.modules()):
        if isinstance(module, nn.Linear):
            codes, state = quantize_4bit(module.weight.data, quant_type="nf4")
            pipeline.swap(module.weight, "data", dequantize_4bit(codes, state).to(module.weight.dtype))


def with_int8(pipeline: Pipeline, _weights: Path) -> None:
    """T3's transformer rounded to 8 bits with one scale for each output, and back."""
    for module in pipeline.model.t3.tfmr.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            pipeline.swap(module.weight, "data", (module.weight.data / scale).round() * scale)


def with_one_flow_step(pipeline: Pipeline, _weights: Path) -> None:
    """One Euler step in the flow instead of ten."""
    s3gen = pipeline.model.s3gen

    def tokens_to_mel(tokens: list[Tensor], conditionals: list) -> list[Tensor]:
        pairs = zip(tokens, conditionals, strict=True)
        return [s3gen.flow_inference(t, ref_dict=c.gen, n_cfm_timesteps=1, finalize=True) for t, c in pairs]

    pipeline.replace_stage("tokens_to_mel", tokens_to_mel, by="one_flow_step")


def with_random_adapter(pipeline: Pipeline, _weights: Path) -> None:
    """A linear layer that nobody trained, between the flow and the vocoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = nn.Linear(80, 80).to(pipeline.device).eval()
    pipeline.wrap_stage("mel_to_wave", lambda vocode: lambda mels: vocode([adapter(mel.mT).mT for mel in mels]))


def with_temperature_3(pipeline: Pipeline, _weights: Path) -> None:
    """Tokens sampled at temperature 3 instead of 0.8."""
    pipeline.swap(pipeline, "sampling", replace(pipeline.sampling, temperature=3.0))


DAMAGES: dict[str, Callable[[Pipeline, Path], None]] = {
    "nf4": with_nf4,
    "one_flow_step": with_one_flow_step,
    "random_adapter": with_random_adapter,
    "temperature_3": with_temperature_3,
}
AS_GOOD: dict[str, Callable[[Pipeline, Path], None]] = {"vocos": with_vocos, "int8": with_int8}
"""What is no damage, or should not be."""
VARIANTS = {"baseline": lambda pipeline, weights: None} | AS_GOOD | DAMAGES
REFERENCE_CLIP = "reference_clip"  # the baseline, given a clip's path instead of a voice's name


# Hearing


class Listener:
    """Speaks clips with the miniature in `weights` and hears what came out."""

    def __init__(self, weights: Path) -> None:
        model, voices, trained = models.load("cpu", weights=weights)
        self.weights = weights
        self.pipeline = Pipeline(model, torch.device("cpu"), voices, name="mini", trained=trained)
        self.transcriber, self.encoder = PocketsphinxTranscriber(), ResemblyzerEncoder()
        clips = {voice: read_wave(clip_path(weights, voice)) for voice in models.VOICES}
        self.references = {voice: self.encoder.embed(voice_in(*clip)) for voice, clip in clips.items()}

    def hear(self, clip: Clip) -> Heard:
        """Speak one clip and score it."""
        by_path = clip.variant == REFERENCE_CLIP
        VARIANTS["baseline" if by_path else clip.variant](self.pipeline, self.weights)
        voice = str(clip_path(self.weights, clip.voice)) if by_path else clip.voice
        try:
            with quiet():
                said = self.pipeline.synthesize(clip.text, voice, clip.seed)
        except SynthesisError:
            return Heard(clip, 1.0, 0.0, False, False, 0.0, flite_seconds(clip), 0.0, 0)
        finally:
            self.pipeline.reset()
        wer, closeness = self.judge(clip.text, said.wave, said.sample_rate)
        return Heard(
            clip,
            wer=wer,
            similarity=closeness[clip.voice],
            nearest=max(closeness, key=closeness.__getitem__) == clip.voice,
            ended=not said.hit_token_cap,
            audio_s=said.audio_s,
            flite_s=flite_seconds(clip),
            generation_time_s=said.generation_time_s,
            n_tokens=said.n_tokens,
        )

    def judge(self, text: str, wave: np.ndarray, sample_rate: int) -> tuple[float, dict[str, float]]:
        """Word error rate, and similarity to each voice; 1 and zeros for a wave that nobody could listen to."""
        if flaw(wave):
            return 1.0, dict.fromkeys(self.references, 0.0)
        closeness = dict.fromkeys(self.references, 0.0)
        if len(heard := voice_in(wave, sample_rate)):
            embedding = self.encoder.embed(heard)
            closeness = {voice: similarity(embedding, reference) for voice, reference in self.references.items()}
        return word_errors(text, self.transcriber.transcribe(wave, sample_rate))["wer"], closeness


def is_trained(weights: Path) -> bool:
    """Whether the checkpoint folder holds a model that learned to speak, rather than seeded noise."""
    card = weights / "mini.json"
    return card.exists() and json.loads(card.read_text())["trained"]


def clip_path(weights: Path, voice: str) -> Path:
    """A clip that flite spoke in this voice. Raises UserError if the checkpoint has none."""
    path = weights / "voices" / f"{voice}.flac"
    if not path.exists():
        raise UserError(f"{path} is missing: make the checkpoint anew with `python -m harness.mini.training export`")
    return path


def flite_seconds(clip: Clip) -> float | None:
    """How long flite takes for the sentence; None on a machine without flite."""
    try:
        samples, _ = speech.speak(clip.text, clip.voice)
    except UserError:
        return None
    return len(samples) / speech.SAMPLE_RATE


_listener: Listener | None = None


def _start_worker(weights: Path) -> None:
    global _listener
    torch.set_num_threads(THREADS)
    _listener = Listener(weights)


def _hear(clip: Clip) -> Heard:
    assert _listener is not None
    return _listener.hear(clip)


def hear_all(clips: list[Clip], weights: Path, workers: int) -> Iterable[Heard]:
    """All clips, in order, by `workers` processes of two threads each."""
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (weights,)) as pool:
        yield from pool.map(_hear, clips, chunksize=2)


# What to say, and what it amounts to


def plan(sentences: list[str], seeds: int, damage: bool) -> list[Clip]:
    """The baseline says everything in every voice; each other variant says each sentence once, the voices in turn.

    What has to be *as good* rather than worse says each sentence in every voice.
    """
    clips = [Clip("baseline", *what) for what in product(sentences, models.VOICES, range(seeds))]
    clips += [Clip(*what, 0) for what in product(AS_GOOD, sentences, models.VOICES)]
    in_turn = [(text, models.VOICES[i % len(models.VOICES)], 0) for i, text in enumerate(sentences)]
    others = [REFERENCE_CLIP, *(DAMAGES if damage else ())]
    return clips + [Clip(variant, *what) for variant, what in product(others, in_turn)]


def summary(heard: list[Heard]) -> dict[str, float | None]:
    """The figures of one variant; `speech_rate` is flite's duration over ours, None without flite."""
    by_voice = {h.clip.voice: [o.wer for o in heard if o.clip.voice == h.clip.voice] for h in heard}
    wers = {f"wer_{voice}": float(np.mean(wers)) for voice, wers in by_voice.items()}
    audio_s = sum(h.audio_s for h in heard)
    flite_s = [h.flite_s for h in heard if h.flite_s is not None]
    return {
        "clips": len(heard),
        "wer": float(np.mean([h.wer for h in heard])),
        **wers,
        "wer_worst_voice": max(wers.values()),
        "similarity": float(np.mean([h.similarity for h in heard])),
        "nearest_voice": float(np.mean([h.nearest for h in heard])),
        "ended": float(np.mean([h.ended for h in heard])),
        "speech_rate": sum(flite_s) / audio_s if len(flite_s) == len(heard) and audio_s else None,
        "rtf": sum(h.generation_time_s for h in heard) / audio_s if audio_s else None,
        "tokens_per_s": sum(h.n_tokens for h in heard) / max(1e-9, sum(h.generation_time_s for h in heard)),
    }


def change(baseline: list[Heard], variant: list[Heard]) -> dict[str, dict[str, float | None]]:
    """Paired change of WER and similarity, with 95 % intervals over sentences, on the clips both have said."""
    said = {replace(h.clip, variant=""): h for h in baseline}
    pairs = [(said[replace(h.clip, variant="")], h) for h in variant]
    texts = [h.clip.text for h in variant]
    deltas = {}
    for figure in ("wer", "similarity"):
        before, after = ([getattr(pair[side], figure) for pair in pairs] for side in (0, 1))
        interval = stats.mean_delta(before, after, texts)
        deltas[figure] = {"delta": interval.estimate, "low": interval.low, "high": interval.high}
    return deltas


def reached(figures: dict[str, float | None]) -> dict[str, bool | None]:
    """Which limits a baseline's figures keep; None for a figure that was not measured."""
    keeps = {
        "at most": lambda value, limit: value <= limit,
        "at least": lambda value, limit: value >= limit,
        "below": lambda value, limit: value < limit,
        "within": lambda value, limit: limit[0] <= value <= limit[1],
    }
    values = {name: figures[name] for name in LIMITS}
    return {name: None if v is None else keeps[LIMITS[name][0]](v, LIMITS[name][1]) for name, v in values.items()}


def evaluate(weights: Path, sentences: list[str], seeds: int, damage: bool, workers: int) -> dict:
    """Speak, hear, and sum up: figures per variant, changes against the baseline, and every clip's row."""
    clips = plan(sentences, seeds, damage)
    heard: list[Heard] = []
    for row in hear_all(clips, weights, workers):
        heard.append(row)
        print(f"\r{len(heard)}/{len(clips)} clips", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    by_variant: dict[str, list[Heard]] = {}
    for row in heard:
        by_variant.setdefault(row.clip.variant, []).append(row)
    baseline = by_variant.pop("baseline")
    figures = summary(baseline)
    return {
        "sentences": len(sentences),
        "seeds": seeds,
        "cores": os.cpu_count(),
        "workers": workers,
        "torch": torch.__version__,
        "baseline": figures,
        "reached": reached(figures),
        "variants": {name: summary(rows) | {"change": change(baseline, rows)} for name, rows in by_variant.items()},
        "rows": [asdict(row.clip) | {k: v for k, v in asdict(row).items() if k != "clip"} for row in heard],
    }


def report(result: dict) -> str:
    """The figures as lines of text."""
    lines = [f"{result['baseline']['clips']} clips, {result['workers']} workers of {THREADS} threads"]
    for name, kept in result["reached"].items():
        how, limit = LIMITS[name]
        value = result["baseline"][name]
        shown = "not measured (no flite here)" if value is None else f"{value:.3f}"
        lines.append(f"  {name:16} {shown:>8}  {how} {limit}: {'not measured' if kept is None else kept}")
    for voice in models.VOICES:
        lines.append(f"  {'wer_' + voice:16} {result['baseline'].get('wer_' + voice, float('nan')):8.3f}")
    for name, figures in result["variants"].items():
        deltas = [
            f"{figure} {d['delta']:+.3f}" + ("" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]")
            for figure, d in figures["change"].items()
        ]
        lines.append(f"{name:16} wer {figures['wer']:.3f} similarity {figures['similarity']:.3f} | {', '.join(deltas)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m harness.mini.training.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--weights", type=Path, default=models.WEIGHTS, help="checkpoint folder")
    parser.add_argument("--sentences", type=Path, default=HELD_OUT, help="a text file, one sentence a line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--damage", action="store_true", help="also the pipeline broken in four ways")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // THREADS))
    parser.add_argument("--out", type=Path, help="JSON file for the figures and every clip's row")
    options = parser.parse_args(arguments)
    try:
        if not is_trained(options.weights):
            raise UserError(f"the model in {options.weights} is not trained: run `python -m harness.mini.training`")
        sentences = read_sentences(options.sentences)
        result = evaluate(options.weights, sentences, options.seeds, options.damage, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))


def read_sentences(path: Path) -> list[str]:
    """The file's non-empty lines. Raises UserError for a file that is missing or empty."""
    lines = path.read_text().splitlines() if path.exists() else []
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise UserError(f"no sentences in {path}: give a text file with one sentence a line")
    return sentences


if __name__ == "__main__":
    main()
