"""The groups of the configuration: what each setting is called, of which type it is, and within which range.

Hydra has these dataclasses in its ConfigStore, below the YAML files of each group, and so checks names and types
itself. Ranges are checked by `check`, once, where a configuration becomes jobs; what only the workload or a judge can
know stays with them. What a setting is for stands beside its value in `configs/`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from harness.errors import UserError
from harness.load import FIRST_AUDIO_LIMIT_S

LARGEST_SEED = 2**63 - 1
"""PyTorch's generators take 64 bits, signed."""
MOST_TOKENS = 1000
"""Upstream's cap on the speech tokens of one utterance, 40 seconds."""


@dataclass(frozen=True)
class Range:
    """Finite numbers: from `least` to `most`, both allowed, and above `above`, which is not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def __contains__(self, number: float) -> bool:
        return math.isfinite(number) and self.least <= number <= self.most and number > self.above

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least} to {self.most}"
        return f"above {self.above}" if math.isfinite(self.above) else f"of {self.least} or more"


@dataclass(frozen=True)
class Choice:
    """One of the words in `alone`, or a list of one or more of those in `listed`."""

    alone: tuple[str, ...]
    listed: tuple[str, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, list):
            return bool(value) and all(word in self.listed for word in value)
        return value in self.alone

    def __str__(self) -> str:
        listed = f"a list of one or more of {', '.join(self.listed)}"
        if not self.alone:
            return f"give {listed}"
        one = f"{'give' if self.listed else 'choose one of'} {', '.join(self.alone)}"
        return f"{one}, or {listed}" if self.listed else one


def number(default: Any = MISSING, **limits: float) -> Any:
    """A dataclass's field for a number within a `Range`, or a list of such; for None, where that is its default."""
    return _field(default, range=Range(**limits))


def choice(*alone: str, listed: Iterable[str] = (), default: Any = None) -> Any:
    """A dataclass's field for one of the words in `alone`, the first unless said otherwise, or a list of the others."""
    return _field(default if default is not None else alone[0], choice=Choice(alone, tuple(listed)))


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# -- the groups --------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """The arguments of upstream's `generate`, under its names; null leaves one at what the model's class has there."""

    temperature: float | None = number(None, least=0, most=10)
    cfg_weight: float | None = number(None, least=0, most=10)
    exaggeration: float | None = number(None, least=0, most=10)
    repetition_penalty: float | None = number(None, above=0)
    top_k: int | None = number(None, least=1)
    top_p: float | None = number(None, least=0, most=1)
    min_p: float | None = number(None, least=0, most=1)
    max_new_tokens: int | None = number(None, least=1, most=MOST_TOKENS)


@dataclass
class Pipeline:
    name: str = MISSING
    loader: str = MISSING
    checkpoint_dir: str | None = None
    seed: int = number(0, least=0, most=LARGEST_SEED)
    threads: int | None = number(None, least=1)
    language: str | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Workload:
    name: str = MISSING
    description: str = ""
    file: str | None = None
    texts: list[Any] = field(default_factory=list)
    passages: dict[str, Any] | None = None
    voices: list[str] = MISSING
    seeds: list[int] = MISSING
    cross: str = "round_robin"
    scenario: str = "single_stream"


@dataclass
class Thresholds:
    rtf: float = number(above=0)
    memory: float = number(above=0)
    wer: float = number(above=0)
    sim: float = number(above=0)


@dataclass
class Measure:
    name: str = MISSING
    processes: int = number(1, least=1)
    min_rounds: int = number(least=1)
    max_rounds: int = number(least=1)
    budget_s: float = number(least=0)
    detectable: float | None = number(None, above=0)
    offline_baseline_items: int = number(least=1)
    warmup_calls: int = number(least=0)
    pinned_tokens: int | None = number(None, least=1, most=MOST_TOKENS)
    requests_seed: int | None = number(None, least=0)
    tokens_per_character: float = number(above=0)
    load_limit_s: float = number(above=0)
    call_limit_s: float = number(above=0)
    users: list[int] = number([], least=1)
    requests_per_user: int = number(3, least=1)
    users_limit_s: float = number(60, above=0)
    first_audio_limit_s: float = number(FIRST_AUDIO_LIMIT_S, above=0)
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass
class Quality:
    name: str = MISSING
    asr: str = "pocketsphinx"
    asr_model: str | None = None
    speaker: str = "resemblyzer"
    speaker_model: str | None = None
    fidelity_texts: int = number(3, least=0)
    score: str = choice("now", "later")


@dataclass
class Gate:
    name: str = MISSING
    limits: list[str] = MISSING
    elsewhere: list[str] = field(default_factory=list)
    unavailable: dict[str, list[str]] = field(default_factory=dict)
    retries: int = number(0, least=0)
    budget_s: float = number(0.0, least=0)


GROUPS = {"pipeline": Pipeline, "workload": Workload, "measure": Measure, "quality": Quality, "gate": Gate}


# -- checking ----------------------------------------------------------------------------------------------------


def check(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a setting of the groups that is unknown or out of its range; their types are right."""
    for group, schema in GROUPS.items():
        check_ranges(group, schema, settings[group])
    least, most = settings["measure"]["min_rounds"], settings["measure"]["max_rounds"]
    if most < least:
        raise UserError(f"measure.max_rounds={most}, and measure.min_rounds={least}: the most is the least or more")
    detectable, counts = settings["measure"]["detectable"], settings["measure"]["thresholds"]["rtf"]
    if detectable is not None and detectable <= counts:
        raise UserError(
            f"measure.detectable={detectable}: no change up to measure.thresholds.rtf={counts} counts, so none can be "
            "found; give a larger one, or a smaller threshold"
        )


def check_ranges(place: str, schema: Any, values: Mapping[str, Any]) -> None:
    """Raises UserError unless the values are all settings of the dataclass, of its types and within its ranges."""
    known, types = {field.name: field for field in fields(schema)}, _types(schema)
    for name, value in values.items():
        where = f"{place}.{name}"
        if name not in known:
            raise UserError(f"{where}: there is no such setting{did_you_mean(name, known)}; known: {', '.join(known)}")
        if is_dataclass(types.get(name)):
            check_ranges(where, types[name], value)
            continue
        if not _fits(value, types.get(name, Any)):
            raise UserError(f"{where}={_shown(value)}: give {_words(types[name])}")
        _check_within(where, value, known[name].metadata)


def _check_within(where: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if (choice := metadata.get("choice")) and value not in choice:
        raise UserError(f"{where}={_shown(value)}: {choice}")
    allowed = metadata.get("range")
    if allowed is None or value is None:
        return
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(number in allowed for number in numbers):
        several = "a list of numbers" if isinstance(value, list) else "a number"
        raise UserError(f"{where}={_shown(value)}: give {several} {allowed}")


PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "null",
}
"""The types of settings that have words; what is of another type is not checked."""


def _types(schema: Any) -> dict[str, Any]:
    try:
        return get_type_hints(schema)
    except NameError:  # a stranger's dataclass, whose names only its own module knows
        return {}


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, *get_args(kind)) for one in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return kind not in PLAIN or isinstance(value, kind)


def _words(kind: Any) -> str:
    """The type in words: a whole number, or a list of words."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is list:
        (one,) = get_args(kind)
        return f"a list of {PLAIN.get(one, 'entries').removeprefix('a ')}s"
    return PLAIN.get(kind, "another value")


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint in brackets, empty where nothing known is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
