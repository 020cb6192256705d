"""The report's pictures. Each title states what the picture shows; colours survive colour blindness and print.

Hues are Okabe and Ito's (https://jfly.uni-koeln.de/color/): blue good, vermilion bad, grey undecided; marks
differ in shape as well, so that nothing hangs on colour alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from harness import stats
from harness.report import words
from harness.report.data import Run
from harness.report.document import Figure

GOOD, BAD, NEUTRAL, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": INK,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "legend.frameon": False,
}
WIDTH = 9.0
ROW = 0.42  # height of one row of a list, in inches


def draw(runs: Sequence[Run], folder: Path, suffix: str = "") -> dict[str, Figure]:
    """Draw what the runs of one place allow, into `folder`; keys: rtf, ratio, stages, memory, quality."""
    usable = [run for run in runs if not run.failed]
    painters = {"rtf": _rtf, "ratio": _ratio, "stages": _stages, "memory": _memory, "quality": _quality}
    figures = {}
    with plt.rc_context(STYLE):
        for name, paint in painters.items():
            canvas = paint(usable)
            if canvas is None:
                continue
            title = canvas.axes[0].get_title(loc="left")
            path = folder / f"{name}{suffix}.png"
            canvas.savefig(path)
            plt.close(canvas)
            figures[name] = Figure(path, " ".join(title.split()))
    return figures


def _rows(n: int, extra: float = 1.5) -> tuple[Canvas, Axes]:
    canvas, axes = plt.subplots(figsize=(WIDTH, extra + ROW * n))
    axes.tick_params(axis="y", length=0)
    return canvas, axes


def _number(value: float | None) -> float:
    """Matplotlib leaves out what is not a number."""
    return math.nan if value is None else value


def _colour(verdict: str) -> str:
    return GOOD if verdict in stats.GOOD else BAD if verdict in stats.BAD else NEUTRAL


def _marker(verdict: str) -> str:
    return "o" if verdict in stats.GOOD else "X" if verdict in stats.BAD else "D"


def _rtf(runs: Sequence[Run]) -> Canvas | None:
    """Absolute RTF of every variant with its interval; each combo beside the baseline of its own run."""
    known = [run for run in runs if run.baseline.rtf is not None and run.combo.rtf is not None]
    if not known:
        return None
    canvas, axes = _rows(len(known))
    for row, run in enumerate(known):
        for variant, colour, marker, offset in (
            (run.baseline, INK, "s", -0.13),
            (run.combo, _colour(run.verdict("rtf")), _marker(run.verdict("rtf")), 0.13),
        ):
            rtf = _number(variant.rtf)
            bounds = variant.intervals.get("rtf") or (rtf, rtf)
            axes.plot(bounds, [row + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(rtf, row + offset, marker, color=colour, markersize=6)
    axes.plot([], [], "s-", color=INK, label="baseline")
    axes.plot([], [], "o-", color=GOOD, label="combo, faster")
    axes.plot([], [], "X-", color=BAD, label="combo, slower")
    axes.plot([], [], "D-", color=NEUTRAL, label="combo, no detectable change")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.75 / (0.5 + ROW * len(known))), ncols=4)
    axes.set_yticks(range(len(known)), [run.name for run in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("RTF: seconds of work per second of audio (lower is faster); bars: 95 % intervals")
    fastest = min(known, key=lambda run: run.combo.rtf or 0.0)
    axes.set_title(
        f"The lowest RTF is {fastest.name}'s: {words.number(fastest.combo.rtf)}, "
        f"its baseline's {words.number(fastest.baseline.rtf)}"
    )
    return canvas


def _ratio(runs: Sequence[Run]) -> Canvas | None:
    """Time ratios with intervals against the band in which a change does not count."""
    known = [run for run in runs if run.change("rtf").value is not None]
    if not known:
        return None
    known = sorted(known, key=lambda run: run.change("rtf").value or 0.0)
    canvas, axes = _rows(len(known))
    threshold = known[0].summary.thresholds["rtf"]
    axes.axvspan(1 - threshold, 1 + threshold, color="#E8E8E8", linewidth=0)
    axes.axvline(1, color="#666666", linewidth=1)
    for row, run in enumerate(known):
        record, colour = run.change("rtf"), _colour(run.verdict("rtf"))
        bounds = [_number(record.low), _number(record.high)]
        axes.plot(bounds, [row] * 2, color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(_number(record.value), row, _marker(record.verdict), color=colour, markersize=7)
        note = f"{words.change(record)}  {record.verdict}"
        axes.annotate(note, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.set_yticks(range(len(known)), [run.name for run in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"RTF ratio, combo / baseline (lower is faster); grey: within {threshold:.0%}, does not count")
    faster = sum(run.verdict("rtf") == "faster" for run in known)
    slower = sum(run.verdict("rtf") == "slower" for run in known)
    axes.set_title(_ratio_title(known, faster, slower))
    return canvas


def _ratio_title(runs: Sequence[Run], faster: int, slower: int) -> str:
    if len(runs) == 1:
        record = runs[0].change("rtf")
        if record.verdict in (stats.NO_CHANGE, stats.NOT_MEASURED):
            return f"{runs[0].name}: {record.verdict} in time"
        return f"{runs[0].name} takes {words.amount_of_change('rtf', record.value or 1.0)} than the baseline"
    rest = len(runs) - faster - slower
    return f"Of {len(runs)} combos, {faster} are faster, {slower} slower, {rest} without detectable change"


def _stages(runs: Sequence[Run]) -> Canvas | None:
    """Where the time of an utterance goes, stacked, the baseline on top."""
    known = [run for run in runs if run.combo.stages_s]
    if not known:
        return None
    bars = [("baseline", known[0].baseline.stages_s), *((run.name, run.combo.stages_s) for run in known)]
    names = list(dict.fromkeys(name for _, stages in bars for name in stages))
    total = max(sum(stages.values()) for _, stages in bars)
    names = [name for name in names if any(stages.get(name, 0.0) > 0.002 * total for _, stages in bars)]
    canvas, axes = _rows(len(bars))
    for row, (_, stages) in enumerate(bars):
        left = 0.0
        for name, colour in zip(names, STAGE_COLOURS, strict=False):
            width = stages.get(name, 0.0)
            axes.barh(row, width, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.8)
            left += width
        axes.text(left + 0.008 * total, row, words.seconds(left), va="center", fontsize=10)
    for name, colour in zip(names, STAGE_COLOURS, strict=False):
        axes.barh(0, 0, color=colour, label=name)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.75 / (0.5 + ROW * len(bars))), ncols=4)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * total)
    axes.set_xlabel("seconds per utterance, mean of the steady state")
    base = known[0].baseline.stages_s
    largest = max(base, key=lambda name: base[name])
    axes.set_title(f"{largest} takes {words.percent(base[largest] / sum(base.values()))} of the baseline's time")
    return canvas


def _memory(runs: Sequence[Run]) -> Canvas | None:
    """Peak memory of combo and baseline, with what the loaded model holds as a tick."""
    known = [run for run in runs if run.baseline.peak_memory_mb and run.combo.peak_memory_mb]
    if not known:
        return None
    canvas, axes = _rows(len(known))
    for row, run in enumerate(known):
        verdict = run.verdict("peak_memory_mb")
        for variant, colour, offset in ((run.baseline, "#BBBBBB", -0.17), (run.combo, _colour(verdict), 0.17)):
            axes.barh(row + offset, _number(variant.peak_memory_mb), height=0.3, color=colour)
            if variant.model_memory_mb:
                axes.plot(
                    [variant.model_memory_mb] * 2, [row + offset - 0.15, row + offset + 0.15], color="white", lw=2
                )
        note = f"{words.megabytes(run.combo.peak_memory_mb)}  {verdict}"
        axes.annotate(note, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.barh(0, 0, color="#BBBBBB", label="baseline")
    axes.barh(0, 0, color=GOOD, label="combo, less")
    axes.barh(0, 0, color=BAD, label="combo, more")
    axes.barh(0, 0, color=NEUTRAL, label="combo, no detectable change")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.75 / (0.5 + ROW * len(known))), ncols=4)
    axes.set_yticks(range(len(known)), [run.name for run in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    kind = known[0].baseline.memory_kind
    meaning = "allocated on the GPU" if kind == "vram" else "resident in the process"
    axes.set_xlabel(f"peak memory in MB, {meaning}; white tick: the loaded model")
    axes.set_title(_memory_title(known))
    return canvas


def _memory_title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        record = runs[0].change("peak_memory_mb")
        if record.verdict in ("less", "more"):
            return f"{runs[0].name} needs {words.amount_of_change('peak_memory_mb', record.value or 1.0)} at its peak"
        return f"{runs[0].name}: {record.verdict} in peak memory"
    less = sum(run.verdict("peak_memory_mb") == "less" for run in runs)
    more = sum(run.verdict("peak_memory_mb") == "more" for run in runs)
    return f"Of {len(runs)} combos, {less} need less memory at their peak and {more} need more"


def _quality(runs: Sequence[Run]) -> Canvas | None:
    """Speed against quality: what was bought, and at what price."""
    known = [run for run in runs if run.change("rtf").low is not None and run.change("wer").low is not None]
    if not known:
        return None
    canvas, axes = plt.subplots(figsize=(WIDTH, 5.2))
    threshold = known[0].summary.thresholds["wer"]
    axes.axhspan(-threshold, threshold, color="#E8E8E8", linewidth=0)
    axes.axvline(1, color="#666666", linewidth=1)
    axes.axhline(0, color="#666666", linewidth=1)
    for run in known:
        time, wer = run.change("rtf"), run.change("wer")
        colour = BAD if run.quality() == "worse" else _colour(time.verdict)
        marker = _marker("worse" if run.quality() == "worse" else time.verdict)
        x, y = _number(time.value), _number(wer.value)
        axes.plot([_number(time.low), _number(time.high)], [y, y], color=colour, linewidth=1.5, alpha=0.7)
        axes.plot([x, x], [_number(wer.low), _number(wer.high)], color=colour, linewidth=1.5, alpha=0.7)
        axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="white")
        axes.annotate(run.name, (x, y), xytext=(7, 6), textcoords="offset points", fontsize=10)
    axes.set_xlabel("RTF ratio, combo / baseline (lower is faster)")
    axes.set_ylabel("change of WER (lower is better)")
    axes.margins(x=0.15, y=0.15)
    kept = [run for run in known if run.verdict("rtf") == "faster" and run.quality() == "kept"]
    lost = [run for run in known if run.quality() == "worse"]
    axes.set_title(
        f"{words.count(len(kept), 'combo')} faster with quality kept, {len(lost)} with worse quality; "
        f"grey: within {threshold:g}"
    )
    return canvas
