"""Run folders as a job would write them, from a few effects: what the tests read."""

import datetime
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.results import BASELINE, Measurement, RunFolder, Score, Summary
from harness.summarize import build_summary

STAGES = {
    "condition": 0.01,
    "generate_tokens": 0.7,
    "tokens_to_mel": 0.2,
    "mel_to_wave": 0.06,
    "watermark": 0.03,
}
TWELVE = (
    "alignment_analyzer",
    "flash_attention",
    "mixed_precision",
    "warmup",
    "vocos",
    "token_sequence",
    "quantization",
    "cuda_cache",
    "inference_mode",
    "channels_last",
    "kv_cache",
    "cpu_offload",
)


@dataclass
class Effect:
    """What a combo does to the baseline: factors for time and memory, shifts for quality."""

    time: float = 1.0
    memory: float = 1.0
    wer: float = 0.0
    similarity: float = 0.0
    audio: float = 1.0


@dataclass
class Case:
    """One synthetic run; the defaults are a small, clean one."""

    combo: str = "production"
    effect: Effect = field(default_factory=lambda: Effect(time=0.6))
    enabled: tuple[str, ...] = ("kv_cache", "inference_mode")
    against: str = BASELINE
    reference: tuple[str, ...] = ()
    reference_effect: Effect = field(default_factory=Effect)
    parameters: dict[str, dict] = field(default_factory=dict)
    requires: dict[str, list[str]] = field(default_factory=dict)
    sweep: str | None = None
    statuses: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    evidence: dict[str, dict] = field(default_factory=dict)
    pipeline: str = "mini"
    device: str = "Test CPU, 2 cores"
    commit: str = "0123456789ab"
    memory_kind: str = "rss"
    texts: int = 8
    rounds: int = 2
    processes: int = 1
    seeds: int = 3
    first_seed: int = 1
    noise: float = 0.01
    scored: bool = True
    trained: bool = True
    unmeasured: str | None = None
    wer: float = 0.1
    seed: int = 0


def make_run(results: Path, case: Case, minute: int = 0) -> RunFolder:
    """A complete run folder with its summary."""
    folder = write_rows(results, case, minute)
    folder.write_summary(build_summary(folder))
    return folder


def make_summary(results: Path, case: Case, minute: int = 0) -> Summary:
    return make_run(results, case, minute).summary()


def write_rows(results: Path, case: Case, minute: int = 0) -> RunFolder:
    """Everything but the summary."""
    when = datetime.datetime(2026, 3, 14, 9, minute)
    folder = RunFolder.create(results, case.combo, case.pipeline, now=when)
    folder.write_job(
        {
            "combo": case.combo,
            "sweep": case.sweep,
            "requires": case.requires,
            "against": case.against,
            "against_optimizations": {name: {} for name in case.reference},
            "pipeline": {"name": case.pipeline},
            "workload": {"name": "quick", "seeds": list(seeds_of(case))},
            "optimizations": {
                name: {"enabled": name in case.enabled, **case.parameters.get(name, {})} for name in TWELVE
            },
        }
    )
    folder.write_json(
        "environment.json",
        {
            "device": case.device,
            "git": {"commit": case.commit, "dirty": False},
            "config_hash": "cafe",
            "packages": {"torch": "2.11.0", "chatterbox-tts": "0.1.7"},
        },
    )
    expected = {"first": 1, "warmup": 2, "speed": case.texts * case.rounds}
    expected = {step: n * case.processes for step, n in expected.items()} | {"quality": case.texts * case.seeds}
    folder.write_json(
        "plan.json",
        {name: dict(expected) for name in (case.against, variant_name(case))},
    )
    rng = np.random.default_rng(case.seed)
    variants = {case.against: case.reference_effect, variant_name(case): case.effect}
    for row in _measurements(case, variants, rng):
        folder.add_measurement(row)
    if case.scored and case.unmeasured is None:
        for score in _scores(case, variants, rng):
            folder.add_score(score)
    folder.write_json(
        "children.json", {name: [_child(case, effect)] * case.processes for name, effect in variants.items()}
    )
    statuses = dict.fromkeys(case.enabled, ("active", None)) | case.statuses
    records = {
        name: {
            "enabled": name in case.enabled,
            "status": statuses.get(name, ("off", None))[0],
            "reason": statuses.get(name, ("off", None))[1],
            "evidence": case.evidence.get(name, {}),
        }
        for name in TWELVE
    }
    before = {name: {"enabled": True, "status": "active", "reason": None, "evidence": {}} for name in case.reference}
    folder.write_json("optimizations.json", {variant_name(case): records, case.against: before})
    folder.write_json(
        "timing.json",
        {
            "job_s": 60.0,
            "measured_s": 50.0,
            "loading_s": 6.0,
            "evidence_s": 0.5,
            "scoring_s": 1.5,
            "orchestration_s": 2.0,
            "orchestration_share": 2 / 60,
        },
    )
    return folder


def seeds_of(case: Case) -> range:
    """The seeds of its quality pass."""
    return range(case.first_seed, case.first_seed + case.seeds)


def variant_name(case: Case) -> str:
    return f"{case.combo}_again" if case.combo == BASELINE else case.combo


def _child(case: Case, effect: Effect) -> dict:
    return {
        "load_s": 4.0,
        "model_memory_mb": 300.0 * effect.memory,
        "memory_kind": case.memory_kind,
        "trained": case.trained,
        "quality_unmeasured_reason": case.unmeasured,
        "status": "ok",
        "error": None,
        "process_to_first_utterance_s": 6.0,
    }


def _measurements(case: Case, variants: dict[str, Effect], rng: np.random.Generator):
    def row(
        variant: str, effect: Effect, step: str, text: int, seed: int, round_: int, process: int = 0, slow: float = 1.0
    ):
        pinned = 60 + 5 * text
        audio = pinned / 25 * (effect.audio if step == "speed" else 1.0)
        seconds = 0.5 * pinned / 25 * effect.time * slow * float(np.exp(rng.normal(0, case.noise)))
        return Measurement(
            variant=variant,
            pass_name=step,
            text_id=f"t{text}",
            text=f"This is sentence number {text}.",
            voice="rms",
            seed=seed,
            process=process,
            round=round_,
            generation_time_s=seconds,
            audio_s=audio,
            n_tokens=pinned,
            pinned_tokens=pinned if step == "speed" else None,
            n_segments=1,
            stages_s={name: seconds * share for name, share in STAGES.items()},
            peak_memory_mb=500.0 * effect.memory + text,
            memory_kind=case.memory_kind,
            level_dbfs=-20.0,
            audio=f"audio/{variant}/t{text}-rms-s{seed}.wav" if step == "quality" else None,
        )

    for name, effect in variants.items():
        for process in range(case.processes):
            yield row(name, effect, "first", 0, 1, 0, process, slow=4.0)
            for index in range(2):
                yield row(name, effect, "warmup", index, 1, 0, process, slow=1.2)
            for round_ in range(case.rounds):
                for text in range(case.texts):
                    yield row(name, effect, "speed", text, 1, round_, process)
        for seed in seeds_of(case):
            for text in range(case.texts):
                yield row(name, effect, "quality", text, seed, 0)


def _scores(case: Case, variants: dict[str, Effect], rng: np.random.Generator):
    for name, effect in variants.items():
        for seed in seeds_of(case):
            for text in range(case.texts):
                wer = float(max(0.0, case.wer + effect.wer + rng.normal(0, 0.01)))
                yield Score(
                    variant=name,
                    text_id=f"t{text}",
                    voice="rms",
                    seed=seed,
                    reference="this is a sentence of ten words and no more",
                    hypothesis="this is a sentence of ten words and no more",
                    wer=wer,
                    hits=9,
                    substitutions=1,
                    similarity={"sim_resemblyzer": 0.85 + effect.similarity + float(rng.normal(0, 0.005))},
                )
