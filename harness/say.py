"""python -m harness say: one text, spoken with a combo into a file.

    python -m harness say "Will it rain tomorrow?" --combo production --voice awb -o rain.wav
    echo "Will it rain tomorrow?" | python -m harness say --compare
    python -m harness say --stream -o - "Will it rain tomorrow?" | aplay

`--compare` speaks it without the combo as well, and says how long both took, each once it had spoken it before. That is
an impression of one text, and no measurement: `run_sweep.py` makes those. `--stream` writes each piece as soon as it is
made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness import preflight
from harness.clips import check_clip, is_clip
from harness.combos import combo_file
from harness.console import say, say_error
from harness.errors import UserError
from harness.sampling import check_language

SEED = 1
FORMATS = (".wav", ".flac", ".ogg", ".mp3")
CAP_S = 40.0
"""Where upstream cuts off what it speaks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="what to say (default: what standard input says)")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out.wav"), metavar="FILE", help="default: out.wav; - with --stream: WAV"
    )
    parser.add_argument(
        "--combo",
        help="a name of configs/combo, or a file like those (default: production, or streaming with --stream)",
    )
    parser.add_argument("--voice", metavar="NAME|CLIP", help="one of the pipeline's, or the path of a reference clip")
    parser.add_argument("--compare", action="store_true", help="speak it without the combo as well, and time both")
    parser.add_argument("--stream", action="store_true", help="write each piece as soon as it is made")
    parser.add_argument("--pipeline", default="mini", help="mini, chatterbox, multilingual, ... (default: mini)")
    parser.add_argument(
        "--checkpoint-dir", type=Path, metavar="FOLDER", help="the checkpoint's files, in place of the hub"
    )
    parser.add_argument("--language", default="en", help="of a multilingual pipeline (default: en)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def main() -> int:
    """The command by itself, `chatterbox-say`; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except UserError as error:
        say_error(f"error: {error}")
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Raises UserError for a text, a voice, a combo or a file that will not do."""
    if options.stream and options.compare:
        raise UserError("--compare times whole utterances: leave out --stream, or --compare")
    options.combo = options.combo or ("streaming" if options.stream else "production")
    text, out = _text(options.text), options.out if _is_pipe(options) else _writable(options.out)
    _look_first(options)
    _quiet()
    from harness.application import optimize
    from harness.checkpoints import load
    from harness.combos import read_combo
    from harness.job import resolve_device
    from harness.plugins import import_catalogue

    name, _ = read_combo(options.combo, import_catalogue())
    with contextlib.redirect_stdout(sys.stderr):  # upstream tells there what it loads
        pipeline = load(options.pipeline, resolve_device(options.device), options.checkpoint_dir)
    pipeline.language = options.language
    voice = options.voice or next(iter(pipeline.voices))
    call = _call(pipeline, text, voice)
    if options.stream:
        target = sys.stdout.buffer if _is_pipe(options) else out
        with contextlib.redirect_stdout(sys.stderr):
            _stream(optimize(pipeline.model, options.combo), call, target)
        return
    upstream = _spoken(pipeline.model, call, again=True) if options.compare else None
    spoken = _spoken(optimize(pipeline.model, options.combo), call, again=options.compare)
    if upstream:
        _write(upstream, out.with_stem(f"{out.stem}-baseline"), "baseline", voice)
    _write(spoken, out, name, voice)
    if upstream:
        say(f"{name} takes {spoken.rtf / upstream.rtf:.3g} of the baseline's time for a second of audio.")


# -- before anything is loaded -----------------------------------------------------------------------------------


def _look_first(options: argparse.Namespace) -> None:
    combo_file(options.combo)
    preflight.check_device(options.device)
    pipeline = {"name": options.pipeline, "loader": preflight.OWN_LOADER, "checkpoint_dir": options.checkpoint_dir}
    preflight.check_loader(pipeline)
    preflight.check_checkpoint(pipeline)
    check_language(pipeline, options.language, "--language")
    if options.voice and is_clip(options.voice):
        check_clip(options.voice)


def _text(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise UserError("nothing to say: give a text, or pipe one in")
    text = " ".join((sys.stdin.read() if given is None else given).split())
    if not any(character.isalnum() for character in text):
        raise UserError("the text has no word in it; give something that can be said")
    return text


def _writable(path: Path) -> Path:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: name a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"--out {path}: this is a folder; name a file")
    return path


def _quiet() -> None:
    """Packages that load and upstream's progress bars are none of a speaker's business."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message=".* failed and is left out")


# -- speaking ----------------------------------------------------------------------------------------------------


@dataclass
class Spoken:
    """`wave` is [1, samples]."""

    wave: Any
    sample_rate: int
    seconds: float

    @property
    def audio_s(self) -> float:
        return self.wave.shape[1] / self.sample_rate

    @property
    def rtf(self) -> float:
        return self.seconds / self.audio_s


def _call(pipeline: Any, text: str, voice: str) -> dict[str, Any]:
    """The arguments of `generate`; a built-in voice becomes upstream's current one."""
    from chatterbox.mtl_tts import ChatterboxMultilingualTTS

    call: dict[str, Any] = {"text": text}
    if isinstance(pipeline.model, ChatterboxMultilingualTTS):
        call["language_id"] = pipeline.language
    if voice in pipeline.voices:
        pipeline.model.conds = pipeline.voices[voice]
    elif Path(voice).is_file():
        call["audio_prompt_path"] = voice
    else:
        raise UserError(
            f"--voice {voice}: neither one of this pipeline's voices ({', '.join(pipeline.voices)}) nor an audio file"
        )
    n_tokens, most = pipeline.text_tokens(text).shape[1], pipeline.model.t3.hp.max_text_tokens
    if n_tokens > most:
        raise UserError(f"the text is too long, {n_tokens} text tokens, and this model reads {most}: split it")
    return call


def _spoken(tts: Any, call: dict[str, Any], again: bool) -> Spoken:
    """What `generate` gives; `again` has it said once before, so that nothing is done for the first time."""
    import torch

    for _ in range(1 + again):
        torch.manual_seed(SEED)
        start = time.perf_counter()
        wave = tts.generate(**call)
        seconds = time.perf_counter() - start
    return Spoken(wave, tts.sr, seconds)


def _is_pipe(options: argparse.Namespace) -> bool:
    return options.stream and str(options.out) == "-"


def _stream(tts: Any, call: dict[str, Any], target: Path | BinaryIO) -> None:
    """Speak into a file, or as a WAV into a pipe, piece by piece, and say on the way when each was there."""
    import torch

    torch.manual_seed(SEED)
    start = time.perf_counter()
    with _sink(target, tts.sr) as write:
        for piece in tts.stream(**call):
            ready_s = time.perf_counter() - start
            write(piece[0].numpy())
            say_error(f"after {ready_s:.2f} s: {piece.shape[1] / tts.sr:.2f} s of audio")


@contextlib.contextmanager
def _sink(target: Path | BinaryIO, sample_rate: int) -> Iterator[Callable[[Any], None]]:
    """What takes waves [samples], one after the other; a pipe gets 16 bits."""
    import soundfile

    if isinstance(target, Path):
        with soundfile.SoundFile(target, "w", sample_rate, channels=1) as file:
            yield file.write
        return
    target.write(endless_wav(sample_rate))

    def write(wave: Any) -> None:
        target.write((wave.clip(-1, 1) * 32767).astype("<i2").tobytes())
        target.flush()

    yield write


def endless_wav(sample_rate: int) -> bytes:
    """The head of a mono WAV in 16 bits whose length nobody knows yet; players take what comes."""
    unknown, mono, width = 0xFFFFFFFF, 1, 2
    form = struct.pack("<HHIIHH", 1, mono, sample_rate, sample_rate * width, width, 8 * width)
    return struct.pack("<4sI4s4sI16s4sI", b"RIFF", unknown, b"WAVE", b"fmt ", len(form), form, b"data", unknown - 36)


def _write(spoken: Spoken, path: Path, combo: str, voice: str) -> None:
    import soundfile

    soundfile.write(path, spoken.wave[0].numpy(), spoken.sample_rate)
    say(f"{path}: {combo}, {voice}: {spoken.audio_s:.2f} s of audio in {spoken.seconds:.2f} s, RTF {spoken.rtf:.3g}")
    if spoken.audio_s >= CAP_S:
        say_error(f"{path}: its end is cut off, as upstream stops after {CAP_S:.0f} s; say less at once")
