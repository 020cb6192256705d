"""What goes through the pipe between an experiment and the process of one variant.

The parent asks in Python's own way; the child answers in JSON, and with the bare samples of its waves. So nothing that
a child sends is run, and what it says of itself is a claim: the parent holds it against its own clock and ears.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Self

import numpy as np

CHUNK = b"\0"
"""Begins what is no answer yet, but samples of one that is still being made; an answer, in JSON, never does."""
_CALLER = struct.Struct("<IB")
SEALED_EVERY = 16
"""A seal covers every sixteenth sample: as good as all of them against a wave that is filled in later, and as fast."""


@dataclass(frozen=True)
class Order:
    """One utterance to speak: all that a child is told of a request."""

    text: str
    voice: str
    seed: int
    n_tokens: int | None = None
    language: str | None = None


@dataclass(frozen=True)
class Said:
    """One utterance as its process describes it; `seal` fixes its wave at the moment of the answer."""

    n_tokens: int
    n_segments: int
    hit_token_cap: bool
    sample_rate: int
    stages_s: dict[str, float]
    seal: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError or AttributeError for what no worker of this harness says."""
        return cls(
            n_tokens=int(record["n_tokens"]),
            n_segments=int(record["n_segments"]),
            hit_token_cap=bool(record["hit_token_cap"]),
            sample_rate=max(1, int(record["sample_rate"])),
            stages_s={str(name): _number(seconds) for name, seconds in record["stages_s"].items()},
            seal=int(record["seal"]),
        )


@dataclass(frozen=True)
class Answer:
    """What came of a call: seconds by the child's own clock, and its utterances or its error."""

    seconds: float
    utterances: tuple[Said, ...] = ()
    error: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Raises what `Said.of` raises."""
        error = record["error"]
        return cls(
            seconds=_number(record["seconds"]),
            utterances=tuple(map(Said.of, record["utterances"])),
            error=None if error is None else str(error),
        )


@dataclass(frozen=True)
class Account:
    """What a child has to say after a call and outside its time: memory, counts, and the waves that follow as bytes.

    `memory` is None on a CPU, where the parent looks for itself.
    """

    n_waves: int
    memory: dict[str, Any] | None = None
    counts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        memory = record["memory"]
        return cls(
            n_waves=int(record["n_waves"]),
            memory=None if memory is None else dict(memory),
            counts={str(name): _number(count) for name, count in record["counts"].items()},
        )


def _number(value: Any) -> float:
    """A claim as a finite number; what is none counts as 0, which agrees with nothing."""
    number = float(value)
    return number if math.isfinite(number) else 0.0


@dataclass(frozen=True)
class Part:
    """What a caller of many is told: more samples, as bytes; or, without any, that this is all, or that it `failed`."""

    caller: int
    samples: bytes = b""
    failed: bool = False

    @property
    def ends(self) -> bool:
        return not self.samples

    def to_bytes(self) -> bytes:
        return _CALLER.pack(self.caller, self.failed) + self.samples

    @classmethod
    def from_bytes(cls, message: bytes) -> Self:
        """Raises ValueError for what no worker sends."""
        if len(message) < _CALLER.size:
            raise ValueError("a part without a caller")
        caller, failed = _CALLER.unpack_from(message)
        return cls(caller, message[_CALLER.size :], bool(failed))


def seal(wave: np.ndarray, offset: int) -> int:
    """A checksum of every sixteenth sample from `offset` on, which the parent draws anew for every call."""
    return zlib.crc32(np.ascontiguousarray(wave[offset % SEALED_EVERY :: SEALED_EVERY]).tobytes())


def encode(answer: Any) -> bytes:
    """JSON of dataclasses, containers, numbers and text; anything else as text."""
    return json.dumps(answer, default=_plain).encode()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else str(value)
