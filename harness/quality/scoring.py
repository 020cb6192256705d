"""A run's clips, judged: word error rate against the text, similarity against the reference clip, the watermark.

Nothing escapes by being absent: a clip that is missing, empty, silent or not finite scores word error rate 1,
similarity 0 and watermark 0, and its row says why. A voice without a reference clip has no similarity at all, for every
variant.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
from numpy.typing import NDArray

from harness.quality.asr import Transcriber, check_transcriber, create_transcriber
from harness.quality.fidelity import flaw
from harness.quality.normalizer import normalize
from harness.quality.speaker import SpeakerEncoder, check_encoder, create_encoder, similarity
from harness.quality.watermark import Detector, create_detector
from harness.results import Measurement, RunFolder, Score, finite, write_atomically

VOICES = Path(__file__).resolve().parent.parent / "mini" / "weights" / "voices"
PROCESSES = 4
"""Each holds a recognizer and a speaker model, 0.7 GB in all; beyond four, starting them costs more than it saves."""

Wave = tuple[NDArray[np.float32], int]


def score_run(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Judge the clips of a run's folder and write scores.jsonl, in place of an earlier one.

    These are all of the quality pass, and those of the speed pass that were kept. `config` is the quality group. Writes
    nothing if there are none. Raises UserError for a recognizer or a speaker model that is unknown or does not load;
    scores that were there before are kept then.
    """
    rows = [row for row in folder.measurements()[0] if is_judged(row)]
    if not rows:
        return
    n = _processes(config, len(rows))
    judge = partial(_judge, results_dir=folder.path, config=dict(config))
    shares = [rows[start::n] for start in range(n)]
    if n == 1:
        judged = [judge(rows)]
    else:
        with ProcessPoolExecutor(n, multiprocessing.get_context("forkserver")) as pool:
            judged = list(pool.map(judge, shares))
    scores = [judged[index % n][index // n] for index in range(len(rows))]
    lines = [json.dumps(finite(score.to_row()), ensure_ascii=False) + "\n" for score in scores]
    write_atomically(folder.scores_file, "".join(lines))


def is_judged(row: Measurement) -> bool:
    """Whether somebody listens to what this row made: a clip of the quality pass, or one that was timed and kept."""
    return row.pass_name == "quality" or (row.pass_name == "speed" and row.audio is not None)


def check_judges(config: Mapping[str, Any]) -> None:
    """Raises, before anything is measured, the UserError that `score_run` would raise after it."""
    check_transcriber(config.get("asr", "pocketsphinx"), config.get("asr_model"))
    check_encoder(config.get("speaker", "resemblyzer"), config.get("speaker_model"))


def _processes(config: Mapping[str, Any], n_rows: int) -> int:
    """One per core for the small models, if each has enough to do; one for a large model, which fills a device."""
    if config.get("asr") == "whisper" or config.get("speaker") == "wavlm":
        return 1
    return max(1, min(os.cpu_count() or 1, PROCESSES, n_rows // 8))


def _judge(rows: Sequence[Measurement], results_dir: Path, config: Mapping[str, Any]) -> list[Score]:
    """One process's share, with judges of its own."""
    import torch

    if config.get("speaker", "resemblyzer") == "resemblyzer":
        torch.set_num_threads(1)
    transcriber = create_transcriber(config.get("asr", "pocketsphinx"), config.get("asr_model"))
    encoder = create_encoder(config.get("speaker", "resemblyzer"), config.get("speaker_model"))
    return score_rows(rows, results_dir, transcriber, encoder, create_detector(), reference_wave)


def score_rows(
    rows: Sequence[Measurement],
    results_dir: Path,
    transcriber: Transcriber,
    encoder: SpeakerEncoder,
    detector: Detector | None,
    reference_wave_for_voice: Callable[[str], Wave | None],
) -> list[Score]:
    """One score for each row, in order; clips are read from `results_dir`. Without a detector, no watermark's."""

    @cache
    def reference_embedding(voice: str) -> NDArray[np.float32] | None:
        reference = reference_wave_for_voice(voice)
        return None if reference is None else encoder.embed(*reference)

    return [score_row(row, results_dir, transcriber, encoder, detector, reference_embedding) for row in rows]


def score_row(
    row: Measurement,
    results_dir: Path,
    transcriber: Transcriber,
    encoder: SpeakerEncoder,
    detector: Detector | None,
    reference_embedding: Callable[[str], NDArray[np.float32] | None],
) -> Score:
    """Judge one clip."""
    clip, reason = _read_clip(row, results_dir)
    hypothesis = transcriber.transcribe(*clip) if clip else ""
    closeness = None
    if (reference := reference_embedding(row.voice)) is not None:
        closeness = similarity(encoder.embed(*clip), reference) if clip else 0.0
    return Score(
        variant=row.variant,
        pass_name=row.pass_name,
        text_id=row.text_id,
        voice=row.voice,
        seed=row.seed,
        audio=row.audio,
        **word_errors(row.text, hypothesis),
        similarity={encoder.metric_name: closeness},
        watermark=_watermark(clip, detector),
        missing=clip is None,
        reason=reason or (f"no reference clip of the voice {row.voice}" if reference is None else None),
    )


def _watermark(clip: Wave | None, detector: Detector | None) -> float | None:
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


def word_errors(text: str, hypothesis: str) -> dict[str, Any]:
    """Columns of a score: both sides as they are compared, the word error rate, and the counts it comes from."""
    reference, heard = normalize(text), normalize(hypothesis)
    errors = jiwer.process_words(reference, heard)
    return {
        "reference": reference,
        "hypothesis": heard,
        "wer": errors.wer,
        "hits": errors.hits,
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
    }


def reference_wave(voice: str) -> Wave | None:
    """The clip that a voice is to sound like: the file itself, or the built-in voice's own; None where it has none."""
    built_in = VOICES / f"{voice}.flac"
    if Path(voice).is_file():
        return read_wave(Path(voice))
    return read_wave(built_in) if built_in.is_file() else None


def read_wave(path: Path) -> Wave:
    """A sound file as a mono wave [samples] float32 at full scale 1.0, and its sample rate."""
    samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples.mean(axis=1), sample_rate
