"""Do a file's contents have the types that the harness writes, and can its figures be true?

The first question separates a file that somebody damaged from one that a run left: a misfit is refused by name. The
second is about what a run itself may leave. A child's clock may have stepped back, and a sum of seconds beyond any
age makes every figure after it infinite: such a figure is read as not measured, and a warning says which it was.
"""

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, TypedDict

from harness.records import Child, Plan

LARGEST = 1e12
"""In any unit: 30,000 years, an exabyte."""
BOUNDS = (
    (re.compile(r"(_s|_mb|_share|tokens|_segments|^memory|^wer|^hits|^(substitu|dele|inser)tions)$"), 0.0, LARGEST),
    (re.compile(r"^sim_"), -1.0, 1.0),
    (re.compile(r"^watermark$"), 0.0, 1.0),
)
"""Lowest and highest figure of a name; what a nested record holds goes by the record's name."""
ROUNDING = 1e-6  # a cosine may come out as 1.0000001


class Record(TypedDict):
    """What became of one optimization."""

    enabled: bool
    status: str
    reason: str | None
    evidence: dict[str, Any]


class Timing(TypedDict, total=False):
    job_s: float
    loading_s: float
    measured_s: float
    evidence_s: float
    scoring_s: float
    orchestration_s: float
    orchestration_share: float
    warnings: list[str]


class Conditions(TypedDict, total=False):
    rounds: list[dict[str, Any]]


class Stage(TypedDict):
    """How far one stage is from the reference's: figures as mean, low and high."""

    verdict: str
    figures: dict[str, dict[str, float]]


class Fidelity(TypedDict, total=False):
    stages: dict[str, Stage]
    reason: str


class Measuring(TypedDict, total=False):
    thresholds: dict[str, float] | None


class Workload(TypedDict, total=False):
    name: str | None
    scenario: str | None
    seeds: list[int] | None
    voices: list[str] | None


class Gate(TypedDict, total=False):
    limits: list[str] | None


class Job(TypedDict, total=False):
    """Of job.yaml, what a summary, a report or a gate asks for."""

    combo: str | dict[str, Any] | None
    against: str | None
    against_optimizations: dict[str, dict[str, Any]] | None
    pipeline: str | dict[str, Any] | None
    workload: Workload | None
    measure: Measuring | None
    quality: dict[str, Any] | None
    gate: Gate | None
    optimizations: dict[str, dict[str, Any] | None] | None
    requires: dict[str, list[str]] | None


class Environment(TypedDict, total=False):
    device: str | dict[str, Any] | None
    cpu: str | dict[str, Any] | None
    git: str | dict[str, Any] | None
    config_hash: Any
    packages: dict[str, str | None] | None
    variables: dict[str, str] | None


FILES: dict[str, Any] = {
    "job.yaml": Job,
    "environment.json": Environment,
    "plan.json": dict[str, Plan],
    "children.json": dict[str, list[Child] | Child],
    "optimizations.json": dict[str, dict[str, Record]],
    "timing.json": Timing,
    "conditions.json": Conditions,
    "fidelity.json": Fidelity,
}

# -- types ---------------------------------------------------------------------------------------------------------

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a record"}


def misfit(value: Any, hint: Any, where: str = "") -> str | None:
    """Where and how `value` differs from the type: "round: expected a whole number, found 'two'"; None if it fits.

    Null fits where a number is expected, for it stands for one that was not finite. A record may lack names, and have
    others.
    """
    if type(value) is hint:
        return None  # most values, and there are many
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Any or (origin is float and value is None):
        return None
    if origin in (types.UnionType, typing.Union):
        problems = [misfit(value, one, where) for one in arguments]
        return next(iter(problems)) if all(problems) else None
    parts = _parts(value, origin, arguments)
    if parts is not None:
        return next((problem for part in parts if (problem := misfit(*part[:2], _inside(where, part[2])))), None)
    kind = dict if _is_record(origin) else origin
    accepted: Any = {float: (int, float), None: types.NoneType, dict: ()}.get(kind, kind)
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return None
    return f"{where or 'all of it'}: expected {WORDS.get(kind, 'null')}, found {repr(value)[:40]}"


def misfit_of_fields(record: Any, hints: Mapping[str, Any]) -> str | None:
    """The first misfit of a dataclass's instance; `hints` are its fields' types."""
    problems = (misfit(getattr(record, name), hint, name) for name, hint in hints.items())
    return next((problem for problem in problems if problem), None)


def _parts(value: Any, origin: Any, arguments: tuple[Any, ...]) -> list[tuple[Any, Any, str]] | None:
    """What a container holds: each value, its type and its name. None for what is not the container it should be."""
    if _is_record(origin):
        fields = _fields(origin)
        if not isinstance(value, Mapping) or not getattr(origin, "__required_keys__", frozenset()) <= value.keys():
            return None
        return [(value[name], hint, name) for name, hint in fields.items() if name in value]
    if origin is list and isinstance(value, list):
        return [(item, arguments[0], str(index)) for index, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        named = [(name, str, "a name in it") for name in value]
        return [*named, *((item, arguments[1], str(name)) for name, item in value.items())]
    return None


@cache
def _fields(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record)


@cache
def _is_record(origin: Any) -> bool:
    return typing.is_typeddict(origin) or is_dataclass(origin)


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# -- figures -------------------------------------------------------------------------------------------------------


def without_impossible(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record with null for each figure that cannot be true, and which those were: "load_s -1".

    A nested record of figures, such as `stages_s`, loses them, and what it lists as null.
    """
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in record.items():
        bounds = _bounds(name)
        if bounds is None:
            kept[name] = value
        elif isinstance(value, dict):
            within = {inner: _within(figure, *bounds) for inner, figure in value.items()}
            kept[name] = {inner: figure for inner, figure in within.items() if figure is not None}
            wrong += [f"{name}.{inner} {value[inner]:.3g}" for inner in value if _lost(value[inner], within[inner])]
        else:
            kept[name] = _within(value, *bounds)
            wrong += [f"{name} {value:.3g}"] if _lost(value, kept[name]) else []
    return kept, wrong


@cache
def _bounds(name: str) -> tuple[float, float] | None:
    return next(((low, high) for pattern, low, high in BOUNDS if pattern.search(name)), None)


def _within(value: Any, low: float, high: float) -> Any:
    """A figure within its bounds, None for one that is not, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not low - ROUNDING <= value <= high + ROUNDING:
        return None
    return min(max(value, low), high) if isinstance(value, float) else value


def _lost(value: Any, kept: Any) -> bool:
    return value is not None and kept is None
