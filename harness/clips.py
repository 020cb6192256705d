"""Reference clips: whether a voice can be learned from one, looked at before anything is loaded.

Upstream reads a clip three times: the speaker encoder all of it, the flow its first 10 seconds, T3 its first 6.
"""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError

T3_READS_S = 6
FLOW_READS_S = 10
LEAST_SOUND_S = 0.5
"""Of sound, in what T3 reads: shorter than a word or two, a clip says nothing of a voice."""
FRAME_S = 0.02
SILENCE_DBFS = -60.0
BELOW_LOUDEST_DB = 40.0
"""A frame that is so much quieter than the loudest one is a pause."""
RATES = (8_000, 384_000)
FULL_SCALE = 10.0
"""Full scale is 1; what goes far beyond was meant on another scale, such as that of 16-bit integers."""
BLOCK = 1 << 20


def is_clip(voice: str) -> bool:
    """Whether a voice is the path of a clip, by its looks: a slash or a suffix. Other names are built-in voices."""
    return "/" in voice or Path(voice).suffix != ""


def check_clip(voice: str) -> str | None:
    """A warning where only a part of the clip is used. Raises UserError where no voice can be learned from it."""
    path = Path(voice)
    if not path.exists():
        raise _refused(path, "there is no such file; give the path of an audio file")
    if not path.is_file():
        raise _refused(path, "a folder or a device, and no audio file")
    duration_s, sound_s = _listen(path)
    if sound_s < LEAST_SOUND_S:
        span = f"its first {T3_READS_S} s hold" if duration_s > T3_READS_S else "it holds"
        raise _refused(path, f"{span} {sound_s:.1f} s of sound, and a voice takes {LEAST_SOUND_S:g} s or more")
    if duration_s > FLOW_READS_S:
        return (
            f"of the reference clip {path} ({duration_s:.0f} s) the speaker encoder hears all, but the flow reads only "
            f"the first {FLOW_READS_S} s and T3 the first {T3_READS_S} s"
        )
    return None


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"workload.voices: the reference clip {path}: {reason}")


def _listen(path: Path) -> tuple[float, float]:
    """The clip's duration [s], and how much of what T3 reads is sound [s]. Raises UserError for a damaged clip."""
    import numpy as np
    import soundfile

    try:
        with path.open("rb") as stream, soundfile.SoundFile(stream) as file:
            rate, frames = file.samplerate, file.frames
            if not RATES[0] <= rate <= RATES[1]:
                raise _refused(path, f"{rate} samples a second; speech takes {RATES[0]:,} or more, up to {RATES[1]:,}")
            head, n_read = np.zeros(0, np.float32), 0
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                if not np.isfinite(block).all():
                    raise _refused(path, "it holds samples that are not finite numbers (NaN or infinity)")
                if (peak := float(np.abs(block).max(initial=0.0))) > FULL_SCALE:
                    raise _refused(path, f"its samples reach {peak:g}, and full scale is 1; scale them")
                n_read += len(block)
                if len(head) < T3_READS_S * rate:
                    head = np.concatenate([head, block.mean(axis=1)])[: T3_READS_S * rate]
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise _refused(path, f"it cannot be read as audio ({reason}); give a WAV or FLAC file") from None
    except TypeError:  # of a file whose name says that it has no header
        raise _refused(path, "raw samples, which do not say what they are; give a WAV or FLAC file") from None
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from None
    if n_read == 0:
        raise _refused(path, "it is empty")
    if n_read < frames:
        raise _refused(path, f"it is cut off: {n_read / rate:.1f} s of {frames / rate:.1f} s are there")
    return n_read / rate, _sound_s(head - head.mean(), rate)


def _sound_s(wave, rate: int) -> float:  # numpy is not imported up here
    """How long a wave [samples] is neither silent nor far below its loudest frame [s]."""
    import numpy as np

    size = max(1, int(FRAME_S * rate))
    frames = np.square(wave[: len(wave) // size * size], dtype=np.float64).reshape(-1, size)
    if not len(frames):
        return 0.0
    levels = 10 * np.log10(frames.mean(axis=1) + 1e-30)
    return FRAME_S * int((levels > max(SILENCE_DBFS, levels.max() - BELOW_LOUDEST_DB)).sum())
