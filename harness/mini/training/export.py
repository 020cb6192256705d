"""From a run's stages to a checkpoint folder: upstream's file names, float16, the four voices made ready to use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from chatterbox.tts import ChatterboxTTS
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import UserError
from harness.mini import models
from harness.mini.training.run import Run
from harness.mini.training.speech import SAMPLE_RATE, speak

REFERENCE = "The captain opened an old blue letter and read every line of it again."
REFERENCE_S = 3.6  # a prompt of 90 codes: the flow computes it anew in each of its ten steps
RECOMPUTED = ("_mel_filters", "window")  # the speech tokenizer's buffers
LARGEST_FILE, LARGEST_FOLDER = 12e6, 24e6  # bytes


def train(_: str, run: Run, weights: Path = models.WEIGHTS) -> dict[str, float]:
    """Write the checkpoint folder from a run's finished stages; returns its sizes in MB.

    Raises UserError for a file or folder larger than the repository allows.
    """
    weights.mkdir(parents=True, exist_ok=True)
    speakers = run.load("speakers")
    parts = {"tokenizer": run.load("tokenizer"), "flow": run.load("flow"), "mel2wav": run.load("hift")}
    s3gen = {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}
    s3gen |= {name: t for name, t in speakers.items() if name.startswith("speaker_encoder.")}
    voice_encoder = {name.removeprefix("voice_encoder."): t for name, t in speakers.items() if "voice_encoder." in name}
    write_state(weights / "s3gen.safetensors", s3gen)
    write_state(weights / "t3_cfg.safetensors", run.load("t3"))
    write_state(weights / "ve.safetensors", voice_encoder)
    (weights / "vocos.safetensors").write_bytes(run.path("vocos").read_bytes())
    models.character_tokenizer().save(str(weights / "tokenizer.json"))

    heads = json.loads((run.folder / "align.json").read_text())["analyzer_heads"]
    figures = {stage.name.removesuffix(".done.json"): json.loads(stage.read_text()) for stage in _done(run)}
    card = {"trained": True, "analyzer_heads": heads, "seed": run.seed, "scale": run.scale, "stages": figures}
    (weights / "mini.json").write_text(json.dumps(card, indent=1) + "\n")
    make_voices(weights)

    sizes = {path.name: path.stat().st_size for path in sorted(weights.rglob("*")) if path.is_file()}
    too_large = [name for name, size in sizes.items() if size > LARGEST_FILE]
    if too_large or sum(sizes.values()) > LARGEST_FOLDER:
        raise UserError(
            f"{weights}: {too_large or 'the folder'} is over the limit: make the model in models.py smaller"
        )
    return {"largest_mb": max(sizes.values()) / 1e6, "total_mb": sum(sizes.values()) / 1e6}


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Save under upstream's names: float16 (batch-norm statistics stay float32), tables packed, buffers left out."""
    kept = {name: t for name, t in state.items() if name.rsplit(".", 1)[-1] not in RECOMPUTED}
    packed = {name: models.pack_table(t) if name in models.PACKED_TABLES else t for name, t in kept.items()}
    half = {name: t if "running_" in name or not t.is_floating_point() else t.half() for name, t in packed.items()}
    save_file({name: t.contiguous() for name, t in half.items()}, path)


def reference_clip(voice: str) -> np.ndarray:
    """The voice's reference: int16 at 16 kHz, `REFERENCE_S` long, a whole number of tokens, ending in silence."""
    samples, _ = speak(REFERENCE, voice)
    clip = np.zeros(int(REFERENCE_S * SAMPLE_RATE), np.int16)
    fade = SAMPLE_RATE // 10
    end = len(clip) - fade  # the last 0.1 s is silent whether or not the sentence was finished
    clip[:end] = np.pad(samples[:end], (0, max(0, end - len(samples))))
    clip[end - fade : end] = clip[end - fade : end] * np.linspace(1, 0, fade)
    return clip


def make_voices(weights: Path) -> None:
    """Built-in voices through upstream's own `prepare_conditionals`: voices/<name>.pt and its clip, <name>.flac."""
    folder = weights / "voices"
    folder.mkdir(exist_ok=True)
    model = assembled(weights)
    for voice in models.VOICES:
        path = folder / f"{voice}.flac"
        soundfile.write(path, reference_clip(voice), SAMPLE_RATE, subtype="PCM_16")
        model.prepare_conditionals(str(path))
        model.conds.save(folder / f"{voice}.pt")
    (weights / "conds.pt").write_bytes((folder / f"{models.VOICES[0]}.pt").read_bytes())


def assembled(weights: Path) -> ChatterboxTTS:
    """The model from the folder's files, with no voice yet."""
    parts = models.build_t3().eval(), models.build_s3gen().eval(), models.build_voice_encoder().eval()
    models.load_parts(weights, *parts)
    with torch.inference_mode():
        return ChatterboxTTS(*parts, models.build_tokenizer(weights), "cpu")


def _done(run: Run) -> list[Path]:
    return sorted(run.folder.glob("*.done.json"))
