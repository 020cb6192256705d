"""A run's clips, judged: word error rate against the text, similarity against the reference clip, the watermark.

Nothing escapes by being absent: a clip that is missing, empty, silent or not finite scores word error rate 1,
similarity 0 and watermark 0, and its row says why. Nor by saying next to nothing: less than a second of voice does not
tell whose it is, and is similarity 0 unless the text is too short for more. What has no answer has none for every
variant: the similarity to a voice without a reference clip, the words of a language that the recognizer does not know.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from harness import integrity
from harness.clips import is_clip
from harness.devices import see, visible_gpus
from harness.errors import UserError
from harness.later import unpacked
from harness.quality.asr import SAMPLE_RATE, Transcriber, create_transcriber
from harness.quality.normalizer import normalize
from harness.quality.signals import flaw
from harness.quality.speaker import SpeakerEncoder, create_encoder, similarity, voice_in
from harness.quality.watermark import Detector, create_detector
from harness.quality.words import word_errors
from harness.results import Measurement, RunFolder, Score, finite, write_atomically

VOICES = Path(__file__).resolve().parent.parent / "mini" / "weights" / "voices"
PROCESSES = 4
"""Each holds a recognizer and a speaker model, 0.7 GB in all; beyond four, starting them costs more than it saves."""

MIN_VOICE_S = 1.0
"""Of less voice than this, a speaker model's vector says little about whose it is."""
WORDS_FOR_MORE = 6
"""A text of as many words takes two seconds: one second of voice is missing there, and not asked too much."""

Wave = tuple[NDArray[np.float32], int]


def score_run(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Judge the clips of a run's folder and write scores.jsonl, in place of an earlier one.

    These are all of the quality pass, and those of the speed pass that were kept. `config` is the quality group. Writes
    nothing if there are none. Raises UserError for a recognizer or a speaker model that is unknown or does not load,
    and for clips that a finished run had and that did not come along with it, which are not missing in what was
    measured. Scores that were there before are kept then.
    """
    rows = [row for row in folder.measurements()[0] if is_judged(row)]
    if not rows:
        return
    if absent := integrity.left_behind(folder.path, folder.read_json(integrity.SUMMARY)):
        raise UserError(
            f"{folder.path}: {len(absent)} of its clips are not here ({absent[0]}), so nobody can judge them; copy "
            "them from where they were made, or leave its scores as they are"
        )
    language = (folder.job().get("pipeline") or {}).get("language") or "en"
    n = _processes(config, len(rows))
    shares = [rows[start::n] for start in range(n)]
    with unpacked(folder) as where:
        judged = _judge_all(shares, partial(_judge, results_dir=where, config=dict(config), language=language))
    scores = [judged[index % n][index // n] for index in range(len(rows))]
    lines = [json.dumps(finite(score.to_row()), ensure_ascii=False) + "\n" for score in scores]
    write_atomically(folder.scores_file, "".join(lines))


def _judge_all(shares: Sequence[list[Measurement]], judge: Callable[..., list[Score]]) -> list[list[Score]]:
    """Each share in a process of its own, which sees this one's GPUs."""
    gpus = visible_gpus()
    if len(shares) == 1 and not gpus:
        return [judge(shares[0])]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(len(shares), context, see, (gpus,)) as pool:
        return list(pool.map(judge, shares))


def is_judged(row: Measurement) -> bool:
    """Whether somebody listens to what this row made: a clip of the quality pass, or one that was timed and kept."""
    return row.pass_name == "quality" or (row.pass_name in ("speed", "load") and row.audio is not None)


def _processes(config: Mapping[str, Any], n_rows: int) -> int:
    """One per core for the small models, if each has enough to do; one for a large model, which fills a device."""
    if config.get("asr") == "whisper" or config.get("speaker") == "wavlm":
        return 1
    return max(1, min(os.cpu_count() or 1, PROCESSES, n_rows // 8))


def _judge(rows: Sequence[Measurement], results_dir: Path, config: Mapping[str, Any], language: str) -> list[Score]:
    """One process's share, with judges of its own."""
    import torch

    if config.get("speaker", "resemblyzer") == "resemblyzer":
        torch.set_num_threads(1)
    return score_rows(rows, results_dir, create_judges(config), reference_wave, language)


@dataclass(frozen=True)
class Judges:
    """Who listens. Without a detector nobody says anything of the watermark."""

    transcriber: Transcriber
    encoder: SpeakerEncoder
    detector: Detector | None


def create_judges(config: Mapping[str, Any]) -> Judges:
    """Those that the quality group names. Raises UserError for one that is unknown or does not load."""
    return Judges(
        create_transcriber(config.get("asr", "pocketsphinx"), config.get("asr_model")),
        create_encoder(config.get("speaker", "resemblyzer"), config.get("speaker_model")),
        create_detector(),
    )


def score_rows(
    rows: Sequence[Measurement],
    results_dir: Path,
    judges: Judges,
    reference_wave_for_voice: Callable[[str], Wave | None],
    language: str = "en",
) -> list[Score]:
    """One score for each row, in order; clips are read from `results_dir`."""

    @cache
    def reference(voice: str) -> Reference:
        return embed_reference(voice, reference_wave_for_voice(voice), judges.encoder)

    return [score_row(row, results_dir, judges, reference(row.voice), row.language or language) for row in rows]


@dataclass(frozen=True)
class Reference:
    """A voice's vector of unit length, or why there is none."""

    embedding: NDArray[np.float32] | None
    reason: str | None = None


def embed_reference(voice: str, clip: Wave | None, encoder: SpeakerEncoder) -> Reference:
    """What a voice's clips are compared with."""
    if clip is None:
        return Reference(None, f"no reference clip of the voice {voice}")
    heard = voice_in(*clip)
    if (seconds := len(heard) / SAMPLE_RATE) < MIN_VOICE_S:
        return Reference(None, f"the reference clip of the voice {voice} has {seconds:.1f} s of voice: too little")
    return Reference(encoder.embed(heard))


def score_row(row: Measurement, results_dir: Path, judges: Judges, reference: Reference, language: str) -> Score:
    """Judge one clip."""
    clip, flaw_found = _read_clip(row, results_dir)
    words, deaf = _judge_words(row, clip, judges.transcriber, language)
    voice = voice_in(*clip) if clip else np.zeros(0, dtype=np.float32)
    n_words = len(normalize(row.text, language).split())
    closeness, unlike = _judge_voice(voice, n_words, judges.encoder, reference)
    return Score(
        variant=row.variant,
        pass_name=row.pass_name,
        text_id=row.text_id,
        voice=row.voice,
        seed=row.seed,
        audio=row.audio,
        **words,
        seconds_per_character=len(clip[0]) / clip[1] / len(row.text) if clip else None,
        voiced_s=len(voice) / SAMPLE_RATE,
        hit_token_cap=row.hit_token_cap,
        similarity={judges.encoder.metric_name: closeness},
        watermark=_judge_watermark(clip, judges.detector),
        missing=clip is None,
        reason=flaw_found or "; ".join(filter(None, [deaf, unlike])) or None,
    )


def _judge_words(
    row: Measurement, clip: Wave | None, transcriber: Transcriber, language: str
) -> tuple[dict[str, Any], str | None]:
    """The columns about words, and why they hold nothing if they do."""
    if not transcriber.understands(language):
        return {"text": row.text}, f"the recognizer does not know the language {language}: words are not judged"
    heard = transcriber.transcribe(*clip, language) if clip else ""
    return word_errors(row.text, heard, language), None


def _judge_voice(
    voice: NDArray[np.float32], n_words: int, encoder: SpeakerEncoder, reference: Reference
) -> tuple[float | None, str | None]:
    """The similarity to its reference of the voice [samples] that spoke so many words, and what to say about it."""
    if reference.embedding is None:
        return None, reference.reason
    if (seconds := len(voice) / SAMPLE_RATE) >= MIN_VOICE_S:
        return similarity(encoder.embed(voice), reference.embedding), None
    if n_words < WORDS_FOR_MORE and len(voice):
        return None, f"{seconds:.1f} s of voice are too little to tell whose it is: similarity is not judged"
    return 0.0, f"{seconds:.1f} s of voice, too little for the text: similarity 0"


def _judge_watermark(clip: Wave | None, detector: Detector | None) -> float | None:
    if detector is None:
        return None
    return detector.read(*clip) if clip else 0.0


def _read_clip(row: Measurement, results_dir: Path) -> tuple[Wave | None, str | None]:
    """The clip, or why there is none that could be judged."""
    if not row.ok:
        return None, (row.error or "the synthesis failed").strip().splitlines()[-1]
    if row.non_finite:  # a 16-bit file cannot tell
        return None, "the audio is not finite"
    if row.audio is None or not (results_dir / row.audio).is_file():
        return None, "there is no audio file"
    try:
        wave, sample_rate = read_wave(results_dir / row.audio)
    except soundfile.SoundFileError as error:
        return None, f"the audio file is damaged ({error})"
    reason = flaw(wave)
    return (None, reason) if reason else ((wave, sample_rate), None)


def reference_wave(voice: str) -> Wave | None:
    """The clip that a voice is to sound like: the file itself, or the built-in voice's own; None where it has none."""
    if is_clip(voice):
        return read_wave(Path(voice))
    built_in = VOICES / f"{voice}.flac"
    return read_wave(built_in) if built_in.is_file() else None


def read_wave(path: Path) -> Wave:
    """A sound file as a mono wave [samples] float32 at full scale 1.0, and its sample rate.

    Of several channels the strongest: a silent one does not weaken it, nor one in opposite phase cancel it.
    """
    samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    return np.ascontiguousarray(samples[:, np.square(samples).sum(axis=0).argmax()]), sample_rate
