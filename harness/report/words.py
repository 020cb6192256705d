"""Figures in words: one way to print a number, a unit, an interval, a change."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt

from harness import stats
from harness.results import Comparison

if TYPE_CHECKING:
    from harness.ablation import Effect

NOT_MEASURED = "not measured"
MARKDOWN = MarkdownIt("commonmark", {"html": False})
MINUS = "\N{MINUS SIGN}"
LABELS = {
    "rtf": "RTF",
    "generation_time_s": "generation time",
    "first_audio_s": "first audio",
    "first_call_s": "first call",
    "load_s": "loading",
    "peak_memory_mb": "peak memory",
    "model_memory_mb": "model memory",
    "energy_j_per_audio_s": "energy per second of audio",
    "wer": "WER",
    "wer_timed": "WER of timed clips",
    "watermark": "watermark found",
}


def label(metric: str) -> str:
    """A metric's name for readers; a similarity keeps the name of its speaker model."""
    if metric.startswith("sim_"):
        model = metric.removeprefix("sim_").removesuffix("_timed").replace("_", " ")
        return f"similarity ({model}{', timed clips' if metric.endswith('_timed') else ''})"
    return LABELS[metric]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated, never an exponent."""
    if value is None:
        return NOT_MEASURED
    if value == 0 or not math.isfinite(value):
        return str(value).rstrip("0").rstrip(".") if math.isfinite(value) else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def counted(value: float | None) -> str:
    """A number of things, which a result file may hold as a fraction."""
    return NOT_MEASURED if value is None else f"{value:,g}"


def streams(value: float | None) -> str:
    """So many at a time; 0 of those that were tried, for nobody asked for fewer."""
    if not value:
        return NOT_MEASURED if value is None else "none of the loads that were tried"
    return f"{counted(value)} stream{'' if value == 1 else 's'}"


def seconds(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if value < 0.0001:
        return "under 0.1 ms"
    return f"{number(value * 1000)} ms" if value < 0.1 else f"{number(value)} s"


def megabytes(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.0f} MB"


def rate(value: float | None) -> str:
    """A word error rate or a similarity: three decimals."""
    return NOT_MEASURED if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", MINUS)


def signed(value: float) -> str:
    """Three decimals with a sign, which zero does not have."""
    rounded = round(value, 3)
    return f"{rounded:+.3f}".replace("-", MINUS) if rounded else "0.000"


def percent(share: float) -> str:
    """Of a positive share: one decimal below ten per cent, none above."""
    amount = 100 * share
    return f"{amount:.1f} %" if amount < 9.95 else f"{amount:.0f} %"


def figure(metric: str, value: float | None) -> str:
    """A variant's own figure with its unit."""
    if metric == "energy_j_per_audio_s":
        return NOT_MEASURED if value is None else f"{number(value)} J"
    if metric == "watermark":
        return NOT_MEASURED if value is None else f"{100 * value:.0f} %"
    if metric.endswith("_s") and metric != "tokens_per_s":
        return seconds(value)
    if metric.endswith("_mb"):
        return megabytes(value)
    return rate(value) if metric.startswith(("wer", "sim_")) else number(value)


def with_interval(metric: str, value: float | None, bounds: tuple[float, float] | None) -> str:
    """A figure with its 95 % interval, where there is one."""
    if value is None or bounds is None:
        return figure(metric, value)
    return f"{figure(metric, value)} ({figure(metric, bounds[0])} to {figure(metric, bounds[1])})"


def ratio(value: float) -> str:
    """Three decimals, more for a very small one."""
    return number(value) if abs(value) < 0.1 else f"{value:.3f}"


def change(record: Comparison | stats.Interval | None, kind: str | None = None) -> str:
    """A ratio as "0.612 (0.598 to 0.630)", a delta as "+0.012 (-0.003 to +0.027)", with a true minus."""
    if record is None:
        return NOT_MEASURED
    kind = kind or (record.kind if isinstance(record, Comparison) else "ratio")
    value = record.value if isinstance(record, Comparison) else record.estimate
    if value is None:
        return NOT_MEASURED
    one = ratio if kind == "ratio" else signed
    if record.low is None or record.high is None:
        return one(value)
    return f"{one(value)} ({one(record.low)} to {one(record.high)})"


def verdict(said: str, known: bool = True) -> str:
    """A verdict as readers are told it: what is known and was not judged has none, but it was measured."""
    return "no verdict" if known and said == stats.NOT_MEASURED else said


def effect(one: Effect) -> str:
    """ "peak memory ratio 0.978 (0.971 to 0.985), less"."""
    kind = stats.metric(one.metric).kind
    return f"{label(one.metric)} {kind} {change(one.interval, kind)}, {verdict(one.verdict)}"


def amount_of_change(metric: str, value: float) -> str:
    """ "38 % less time", "2.1 % more memory", "0.012 higher"."""
    if stats.metric(metric).kind == "delta":
        return f"{abs(value):.3f} {'higher' if value > 0 else 'lower'}"
    what = "memory" if metric.endswith("_mb") else "energy" if metric.startswith("energy") else "time"
    return f"{percent(abs(1 - value))} {'less' if value < 1 else 'more'} {what}"


def size(value: float, kind: str) -> str:
    """How large a change is, whatever its direction: "4.1 %" of a ratio, "0.034" of a difference."""
    return percent(value) if kind == "ratio" else f"{value:.3f}"


def agree(n: int, one: str, many: str) -> str:
    """The verb that goes with so many."""
    return one if n == 1 else many


def listing(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def stop(text: str) -> str:
    """The text with exactly one full stop; its first word stays as it is, for it may be a name."""
    return f"{text.strip().rstrip('.')}."


def last_line(text: str | None) -> str:
    """What a traceback, or a one-line reason, comes down to, as Markdown without its full stop."""
    lines = (text or "").strip().splitlines()
    return said(lines[-1].strip().rstrip(".")) if lines else "no reason was given"


def said(text: str) -> str:
    """Somebody else's words as Markdown that shows them as they stand; only `code` remains code."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(piece if odd else _escaped(piece) for odd, piece in zip(cycle((False, True)), pieces, strict=False))


def _escaped(text: str) -> str:
    """Backslashes before all that Markdown would read as its own, also at the beginning of an item."""
    marks = r"[\\`*\[\]<>&~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+=]|(?<=^\d)[.)]|(?<=^\d\d)[.)]"
    return re.sub(marks, r"\\\g<0>", text)


def code(text: str) -> str:
    """A name set as code, whatever is in it."""
    if not text.strip():
        return "(no name)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def markup(markdown: str) -> str:
    """A line of Markdown as HTML."""
    return MARKDOWN.renderInline(markdown)


def plain(markdown: str) -> str:
    """The words of a line of Markdown, for a terminal."""
    (line,) = MARKDOWN.parseInline(markdown)
    return "".join(part.content for part in line.children or ())


def fact(value: Any) -> str:
    """One fact of an evidence or an environment record."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value, digits=4)
    if isinstance(value, list | tuple):
        shown = ", ".join(fact(item) for item in value[:6])
        return f"[{shown}{', ...' if len(value) > 6 else ''}]"
    return "none" if value is None else str(value)


def facts(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a nested record, one after the other."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from facts(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", fact(value)


def _no_less(value: float) -> str:
    """A distance; below a millionth nobody cares how near."""
    return "under 0.000001" if 0 < value < 1e-6 else number(value)


def _part(value: float) -> str:
    """An error as a share; what is not nothing is not told as nothing."""
    return "under 0.1 %" if 0 < value < 5e-4 else percent(value)


FIDELITY: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl_mean": ("KL divergence, mean", lambda value: f"{_no_less(value)} nats"),
    "kl_p99": ("KL divergence, 99th percentile", lambda value: f"{_no_less(value)} nats"),
    "top1_changed": ("likeliest token is another", _part),
    "mel_error": ("relative error of the mel", _part),
    "mel_distance_db": ("distance of the mel", lambda value: f"{_no_less(value)} dB"),
    "wave_distance_db": ("log-spectral distance of the wave", lambda value: f"{_no_less(value)} dB"),
    "wave_error": ("relative error of the wave, its source included", _part),
    "mark_lost": ("confidence in the watermark, lost", rate),
}
"""What the figures of a stage's fidelity are called, and how they are said."""


def fidelity(name: str, value: float | None) -> str:
    """A figure of a stage's fidelity; what is not finite was stored as null."""
    return "not finite" if value is None else FIDELITY[name][1](value)
