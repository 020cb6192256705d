"""The teachers: flite's four voices through its C library, many processes at once, with the phones they spoke.

flite says a sentence in a few milliseconds and knows exactly which phone it is saying when, so a corpus comes with its
own alignment. The library is found on the system (Debian: `apt-get install flite`) or, on a host without a package
manager, under `FLITE_HOME`: a folder into which the packages flite, libflite1 and libasound2 were unpacked with
`dpkg -x`.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.mini.training import text

SAMPLE_RATE = 16_000
PHONE_HOP = SAMPLE_RATE // 50  # one phone label per 20 ms: two per speech token
# fmt: off
PHONES = (
    "pau", "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh", "ih", "iy",
    "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh",
)
# fmt: on
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]
"""Audio, phones, lengths, phone counts, voices and texts of some utterances, the arrays flat."""
_VOICES = ("kal16", "awb", "rms", "slt")  # = models.VOICES, written here so that workers need no torch
LONGEST = 29 * SAMPLE_RATE  # the speech tokenizer cuts clips of more than 30 s
_CHUNK = 40  # utterances a worker makes per job


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_int16)),
    ]


@lru_cache
def _library() -> tuple[ctypes.CDLL, list[int]]:
    """libflite with its four voices registered."""
    home = os.environ.get("FLITE_HOME")
    folders = sorted(Path(home).glob("usr/lib/*-linux-gnu")) if home else []

    def open_library(name: str) -> ctypes.CDLL:
        path = next((str(folder / name) for folder in folders if (folder / name).exists()), name)
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    try:
        if folders:
            open_library("libasound.so.2")  # a dependency that the loader would not find by itself
        flite = open_library("libflite.so.1")
        open_library("libflite_usenglish.so.1")
        open_library("libflite_cmulex.so.1")
        libraries = [open_library(f"libflite_cmu_us_{voice}.so.1") for voice in _VOICES]
    except OSError as error:
        raise UserError(
            f"flite's library was not found ({error}): install Debian's `flite` or set FLITE_HOME"
        ) from error
    for name in ("flite_synth_text", "utt_wave", "utt_relation", "relation_head", "item_next"):
        getattr(flite, name).restype = ctypes.c_void_p
    flite.item_feat_string.restype = ctypes.c_char_p
    flite.item_feat_float.restype = ctypes.c_float
    flite.flite_init()
    voices = []
    for name, library in zip(_VOICES, libraries, strict=True):
        register = getattr(library, f"register_cmu_us_{name}")
        register.restype = ctypes.c_void_p
        voices.append(register(None))
    return flite, voices


def speak(words: str, voice: str) -> tuple[np.ndarray, np.ndarray]:
    """One text in one voice: int16 samples at 16 kHz and an index into `PHONES` for every 20 ms of them."""
    flite, voices = _library()
    utterance = ctypes.c_void_p(flite.flite_synth_text(words.encode(), ctypes.c_void_p(voices[_VOICES.index(voice)])))
    wave = _Wave.from_address(flite.utt_wave(utterance))
    if wave.sample_rate != SAMPLE_RATE or wave.num_channels != 1:
        raise UserError(f"flite's voice {voice} speaks at {wave.sample_rate} Hz, not 16 kHz: use its 16 kHz build")
    samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
    ends, names = [], []
    segment = flite.relation_head(ctypes.c_void_p(flite.utt_relation(utterance, b"Segment")))
    while segment:
        ends.append(flite.item_feat_float(ctypes.c_void_p(segment), b"end"))
        names.append(PHONES.index(flite.item_feat_string(ctypes.c_void_p(segment), b"name").decode()))
        segment = flite.item_next(ctypes.c_void_p(segment))
    flite.delete_utterance(utterance)
    centres = (np.arange(-(-len(samples) // PHONE_HOP)) + 0.5) * PHONE_HOP / SAMPLE_RATE
    spoken = np.searchsorted(np.asarray(ends), centres, side="right").clip(max=len(names) - 1)
    return samples, np.asarray(names, np.int8)[spoken]


@dataclass
class Corpus:
    """Utterances one after the other in flat arrays.

    audio: int16 [samples]; phones: int8 [20 ms frames]; starts, lengths: int64 [n] into `audio`; phone_starts: int64
    [n] into `phones`; voices: int64 [n], an index into `models.VOICES`; texts: n strings.
    """

    audio: np.ndarray
    phones: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    phone_starts: np.ndarray
    voices: np.ndarray
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def hours(self) -> float:
        """Hours of speech."""
        return float(self.lengths.sum()) / SAMPLE_RATE / 3600

    def save(self, folder: Path) -> None:
        """Write the corpus as plain .npy files (so that several processes can map the audio) and a JSON list."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("audio", "phones", "starts", "lengths", "phone_starts", "voices"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "texts.json").write_text(json.dumps(self.texts))

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """A saved corpus, its audio mapped into memory rather than read."""
        if not (folder / "texts.json").exists():
            raise UserError(f"no corpus in {folder}: run the data stage first")
        names = ("audio", "phones", "starts", "lengths", "phone_starts", "voices")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
        return cls(**arrays, texts=json.loads((folder / "texts.json").read_text()))

    def split(self, validation: float = 0.01) -> tuple[Corpus, Corpus]:
        """Training and validation parts; the last share of the utterances is validation. Both are views."""
        cut = len(self) - max(len(_VOICES), round(len(self) * validation))
        return self.part(0, cut), self.part(cut, len(self))

    def part(self, first: int, end: int) -> Corpus:
        """Utterances `first` to `end` (exclusive) as a corpus of their own, without a copy."""
        at = int(self.starts[first]), int(self.phone_starts[first])
        to = int(self.starts[end - 1] + self.lengths[end - 1])
        phones_to = int(self.phone_starts[end]) if end < len(self) else len(self.phones)
        rows = slice(first, end)
        return Corpus(
            audio=self.audio[at[0] : to],
            phones=self.phones[at[1] : phones_to],
            starts=self.starts[rows] - at[0],
            lengths=self.lengths[rows],
            phone_starts=self.phone_starts[rows] - at[1],
            voices=self.voices[rows],
            texts=self.texts[rows],
        )


def _make_chunk(seed: int, number: int) -> Chunk:
    """One worker's job: `_CHUNK` utterances, the same for the same (seed, number)."""
    rng = random.Random(f"{seed}-{number}")
    audio, phones, voices, texts = [], [], [], []
    for index in range(_CHUNK):
        voice = index % len(_VOICES)
        words = text.utterance(rng)
        samples, labels = speak(words, _VOICES[voice])
        if len(samples) > LONGEST:
            continue
        audio.append(samples)
        phones.append(labels)
        voices.append(voice)
        texts.append(words)
    lengths = np.array([len(samples) for samples in audio], np.int64)
    counts = np.array([len(labels) for labels in phones], np.int64)
    return np.concatenate(audio), np.concatenate(phones), lengths, counts, np.array(voices, np.int64), texts


def make_corpus(hours: float, seed: int = 0, workers: int | None = None) -> Corpus:
    """At least `hours` of speech, the voices in turn; the same for the same seed, however many workers make it.

    About 20 utterances a second and core.
    """
    held_out = text.held_out()  # read before the workers start, so that a missing file is one clear error
    if not held_out:
        raise UserError(f"{text.HELD_OUT} is empty: the held-out sentences must be known to keep them out of training")
    chunks, made, wanted = [], 0, hours * 3600 * SAMPLE_RATE
    for chunk in _chunks(seed, workers or os.cpu_count() or 1):
        chunks.append(chunk)
        made += len(chunk[0])
        if made >= wanted:
            break
    audio, phones, lengths, counts, voices = (np.concatenate(parts) for parts in list(zip(*chunks, strict=True))[:5])
    return Corpus(
        audio=audio,
        phones=phones,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        phone_starts=np.cumsum(counts) - counts,
        voices=voices,
        texts=[words for chunk in chunks for words in chunk[5]],
    )


def _chunks(seed: int, workers: int) -> Iterator[Chunk]:
    """Chunks 0, 1, 2 ... without end, some of them made ahead.

    A worker that dies, as when memory runs short for a moment, takes its pool with it; a smaller pool goes on from the
    chunk that is missing, and since a chunk depends on its number alone, nothing else changes. Raises
    BrokenProcessPool when even a single worker does not survive.
    """
    number, context = 0, multiprocessing.get_context("spawn")
    while True:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            pending = deque(pool.submit(_make_chunk, seed, number + i) for i in range(4 * workers))
            try:
                while True:
                    yield pending[0].result()
                    number += 1
                    pending.popleft()
                    pending.append(pool.submit(_make_chunk, seed, number + len(pending)))
            except BrokenProcessPool:
                if workers == 1:
                    raise
                workers = max(1, workers // 2)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
