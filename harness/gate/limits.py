"""What a gate demands: limits in a closed little grammar, and the rules around them.

    rtf:5%                   a ratio metric, in per cent: time may grow by 5 %
    vram:5%  rss:10%         peak memory by its kind; the limit of the kind that the run measured is the one that holds
    wer:+0.02                an error metric, absolute: may rise by 0.02
    sim_resemblyzer:-0.02    a similarity, absolute: may fall by 0.02
    sim_*:-0.02              every similarity that was measured, and at least one must have been
    watermark                the detector must have been asked, and must find in the combo's clips what it finds in the
                             baseline's

A rule that is not understood is bad input, never a rule that nothing can break: no amount may be negative, infinite
or not a number.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness import stats
from harness.errors import UserError
from harness.settings import Gate, check_ranges, did_you_mean

WATERMARK = "watermark"
EVERY_SIMILARITY = "sim_*"
MEMORY = {"vram": "peak_memory_mb", "rss": "peak_memory_mb"}
"""Peak memory under its kind's name."""

_GRAMMAR = re.compile(r"(?P<metric>[a-z_0-9]+|sim_\*):(?P<sign>[+-]?)(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)")


@dataclass(frozen=True)
class Limit:
    """How far `metric` may move in the bad direction: relative for a ratio, absolute for a delta.

    `metric` is a name of the comparison, EVERY_SIMILARITY or WATERMARK, whose amount means nothing. `memory_kind` is
    the only kind of memory that the limit is about, if it is about one.
    """

    text: str
    metric: str
    amount: float = 0.0
    memory_kind: str | None = None

    @property
    def subject(self) -> str:
        """What no two limits of one gate may share."""
        return self.memory_kind or self.metric


@dataclass(frozen=True)
class Rules:
    """What one gate holds a run against.

    `elsewhere` replaces limits of the same subject where the reference was measured on another device. `unavailable`
    maps a kind of device, cpu or cuda, to the optimizations that may be unavailable on it, whatever the reference says.
    What is undecided is measured again up to `retries` times, none of which begins later than `budget_s` after the
    gate did.
    """

    limits: tuple[Limit, ...]
    elsewhere: tuple[Limit, ...] = ()
    unavailable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    retries: int = 0
    budget_s: float = 0.0

    def away(self) -> tuple[Limit, ...]:
        """The limits against a reference of another device."""
        wider = {limit.subject: limit for limit in self.elsewhere}
        return tuple(wider.get(limit.subject, limit) for limit in self.limits)


def parse_limit(text: str) -> Limit:
    """Raises UserError for anything outside the grammar."""
    words = str(text).strip()
    if words == WATERMARK:
        return Limit(words, WATERMARK)
    match = _GRAMMAR.fullmatch(words)
    if match is None or match["metric"] == WATERMARK:
        raise UserError(f"gate limit {words!r}: write metric:amount, such as rtf:5% or wer:+0.02, or watermark")
    name, percent, sign = match["metric"], match["percent"], match["sign"]
    metric = _metric(words, MEMORY.get(name, name))
    if (metric.kind == "ratio") != (percent == "%"):
        way_out = f"{name}:5%" if metric.kind == "ratio" else f"{name}:{_bad_sign(metric)}0.02"
        raise UserError(f"gate limit {words!r}: {name} is judged as a {metric.kind}; write {way_out}")
    if sign and sign != _bad_sign(metric):
        raise UserError(f"gate limit {words!r}: {name} gets worse in the other direction; drop the sign")
    amount = float(match["amount"])
    if not math.isfinite(amount):
        raise UserError(f"gate limit {words!r}: no change is as large as that; write a number that means something")
    kind = name if name in MEMORY else None
    return Limit(words, MEMORY.get(name, name), amount / 100 if percent else amount, kind)


def _metric(text: str, name: str) -> stats.Metric:
    try:
        return stats.metric(name)
    except KeyError:
        known = [*stats.METRICS, *MEMORY, "sim_resemblyzer", EVERY_SIMILARITY, WATERMARK]
        raise UserError(
            f"gate limit {text!r}: no metric {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
        ) from None


def _bad_sign(metric: stats.Metric) -> str:
    return "+" if metric.above in stats.BAD else "-"


def parse_limits(texts: Iterable[str]) -> tuple[Limit, ...]:
    """Raises UserError for none at all, and for two of the same subject, of which only one could hold."""
    limits = tuple(map(parse_limit, texts))
    if not limits:
        raise UserError("the gate has no limits, so nothing could break one: name some, such as rtf:5%")
    subjects: dict[str, Limit] = {}
    for limit in limits:
        if (other := subjects.setdefault(limit.subject, limit)) is not limit:
            raise UserError(f"two gate limits for {limit.subject}: {other.text} and {limit.text}; keep one")
    return limits


def rules_from(settings: Mapping[str, Any]) -> Rules:
    """The rules of a configuration's group `gate`. Raises UserError for one that is unknown or makes no sense."""
    check_ranges("gate", Gate, settings)
    limits = parse_limits(_words(settings, "limits"))
    elsewhere = _words(settings, "elsewhere")
    for limit in map(parse_limit, elsewhere):
        if limit.subject not in {other.subject for other in limits}:
            raise UserError(f"gate.elsewhere: {limit.text} takes the place of no limit in gate.limits")
    unavailable = settings.get("unavailable") or {}
    return Rules(
        limits=limits,
        elsewhere=parse_limits(elsewhere) if elsewhere else (),
        unavailable={kind: frozenset(names) for kind, names in unavailable.items()},
        retries=settings.get("retries", 0),
        budget_s=settings.get("budget_s", 0.0),
    )


def _words(settings: Mapping[str, Any], key: str) -> list[str]:
    value = settings.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"gate.{key}: write a list of words, such as [rtf:5%]")
    return value


def read_rules(path: Path) -> Rules:
    """The rules of a file of configs/gate. Raises UserError for one that is absent or is none."""
    return rules_from(_read(path))


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings over those of the files beside it that its `defaults` name, as Hydra composes them."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a gate's rules ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no gate's rules; configs/gate/default.yaml shows what they look like")
    names = settings.pop("defaults", [])
    below: dict[str, Any] = {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: defaults: write a list of files beside this one, such as [default]")
    for name in names:
        if (other := path.with_name(f"{name}.yaml")) in (path, *above):
            raise UserError(f"{path}: defaults: {name} is built on this file itself")
        below |= _read(other, (path, *above))
    return {**below, **settings}
