"""The report's pictures. Each title states what the picture shows; colours survive colour blindness and print.

Each is made twice: a PNG beside the Markdown, and a drawing inside the page, whose marks tell their figures.

Hues are Okabe and Ito's (https://jfly.uni-koeln.de/color/): blue good, vermilion bad, grey undecided; marks
differ in shape as well, so that nothing hangs on colour alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from harness import stats
from harness.quality.fidelity import DIFFERS, FAITHFUL
from harness.report import drawing, words
from harness.report.data import Run, ranked
from harness.report.document import Figure
from harness.report.drawing import BAND, INK, PALE, RULE, SOFT, tip
from harness.results import BASELINE, Variant

GOOD, BAD, NEUTRAL = "#0072B2", "#D55E00", "#8A8A8A"
STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
STYLE: Any = {
    "font.size": 11,
    "text.parse_math": False,  # a name may hold dollars
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "chatterbox-harness",  # the same figures, the same file
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "legend.frameon": False,
}
WIDTH = 9.0  # inches
ROW, FRAME = 0.42, 1.55  # inches per row of a list, and around it
SMALL = 10
OTHER, SLIVER = "other", 0.002
"""What a call takes beside its stages; with it are those that are nowhere a larger share of the longest bar."""
WIDE = 5.0
"""Of ratios that differ by more than this, the small ones cannot be told apart on a linear axis."""


def draw(runs: Sequence[Run], folder: Path, suffix: str = "") -> dict[str, Figure]:
    """Draw what the runs of one setting allow, into `folder`.

    Keys: ratio, rtf, stages, memory, load, quality, fidelity.
    """
    usable = [run for run in ranked(runs) if not run.failed]
    painters: dict[str, Callable[[Sequence[Run]], Canvas | None]] = {
        "ratio": _ratio,
        "rtf": _rtf if len(usable) > 1 else _nothing,
        "stages": _stages,
        "memory": _memory,
        "load": _load,
        "quality": _quality,
        "fidelity": _fidelity,
    }
    figures = {}
    with plt.rc_context(STYLE):
        for name, paint in painters.items():
            canvas = paint(usable)
            if canvas is not None:
                figures[name] = saved(canvas, folder / f"{name}{suffix}.png")
    return figures


def saved(canvas: Canvas, path: Path) -> Figure:
    """The picture in a file, and as a drawing for the page; the canvas is closed."""
    canvas.savefig(path)
    title = canvas.axes[0].get_title(loc="left")
    canvas.axes[0].set_title("", loc="left")  # the page sets it beside the drawing
    figure = Figure(path, title, drawing.draw(canvas, path.stem))
    plt.close(canvas)
    return figure


def _nothing(_runs: Sequence[Run]) -> None:
    """Of a single run, the ratio says it all."""


# ------------------------------------------------------------------------------------- shared pieces


def listed(names: Sequence[str]) -> tuple[Canvas, Axes]:
    """A picture with one row per name, from top to bottom."""
    canvas, axes = plt.subplots(figsize=(WIDTH, FRAME + ROW * len(names)))
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    return canvas, axes


def note(axes: Axes, row: int, text: str) -> None:
    axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL)


def _legend(canvas: Canvas, handles: Iterable[Any]) -> None:
    canvas.legend(handles=list(handles), loc="outside lower center", ncols=4, fontsize=SMALL)


def _number(value: float | None) -> float:
    """Matplotlib leaves out what is not a number."""
    return math.nan if value is None else value


def colour_of(verdict: str) -> str:
    return GOOD if _is_good(verdict) else BAD if _is_bad(verdict) else NEUTRAL


def _marker(verdict: str) -> str:
    return "o" if _is_good(verdict) else "X" if _is_bad(verdict) else "D"


def _is_good(verdict: str) -> bool:
    return verdict in (*stats.GOOD, FAITHFUL)


def _is_bad(verdict: str) -> bool:
    return verdict in (*stats.BAD, DIFFERS)


def _mark(verdict: str, label: str) -> Any:
    colour = colour_of(verdict)
    return plt.Line2D([], [], color=colour, marker=_marker(verdict), linewidth=2, label=label)


def _count(runs: Sequence[Run], metric: str, verdict: str) -> int:
    return sum(run.verdict(metric) == verdict for run in runs)


def _doubt(run: Run) -> str:
    return "" if run.standing == "ok" else f", {run.standing}"


def _title(run: Run, metric: str, takes: str) -> str:
    """What one run's comparison says about time or memory."""
    record = run.change(metric)
    if record.verdict in (stats.NO_CHANGE, stats.NOT_MEASURED):
        return f"{run.name}: {words.verdict(record.verdict)} in {'time' if metric == 'rtf' else words.label(metric)}"
    return f"{run.name} {takes} {words.amount_of_change(metric, record.value or 1.0)} than {_versus([run])}"


def _of(runs: Sequence[Run], counts: dict[str, int], one: str, many: str) -> str:
    """ "Of 4 combos, 1 is faster and none are slower", the verb agreeing with each number."""
    parts = [f"{n or 'none'} {words.agree(n, one, many)} {what}" for what, n in counts.items()]
    return f"Of {words.count(len(runs), 'combo')}, {words.listing(parts)}"


def _versus(runs: Sequence[Run]) -> str:
    """What the runs are compared with; they share it."""
    return "the baseline" if runs[0].reference == BASELINE else runs[0].reference


def _span(run: Run) -> list[float]:
    """The run's time ratio and its bounds, as far as they are known."""
    record = run.change("rtf")
    return [value for value in (record.low, record.value, record.high) if value and math.isfinite(value)]


def _scale_ratios(axes: Axes, ratios: Sequence[float]) -> None:
    """From nothing on, or on a logarithmic axis where the largest is a multiple of the smallest."""
    if max(ratios, default=1.0) < WIDE * min(ratios, default=1.0):
        axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes.minorticks_off()


# -------------------------------------------------------------------------------------- the pictures


def _ratio(runs: Sequence[Run]) -> Canvas | None:
    """Time ratios with their intervals, and the band in which a change does not count."""
    known = [run for run in runs if run.change("rtf").value is not None]
    if not known:
        return None
    canvas, axes = listed([run.name for run in known])
    threshold = known[0].summary.thresholds["rtf"]
    axes.axvspan(1 - threshold, 1 + threshold, color=BAND, linewidth=0)
    axes.axvline(1, color=RULE, linewidth=1)
    for row, run in enumerate(known):
        record, colour = run.change("rtf"), colour_of(run.verdict("rtf"))
        bounds = [_number(record.low), _number(record.high)]
        (line,) = axes.plot(bounds, [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
        (mark,) = axes.plot(_number(record.value), row, _marker(record.verdict), color=colour, markersize=7)
        for artist in (line, mark):
            tip(artist, f"{run.name}: time ratio {words.change(record)}, {words.count(record.n, 'pair')}")
        note(axes, row, f"{words.change(record)}  {words.verdict(record.verdict)}{_doubt(run)}")
    _scale_ratios(axes, [value for run in known for value in _span(run)])
    axes.set_xlabel(
        f"RTF, divided by that of {_versus(known)} (lower is faster)\n"
        f"grey: within {100 * threshold:g} %, too little to count"
    )
    axes.set_title(
        _title(known[0], "rtf", "takes")
        if len(known) == 1
        else _of(
            known, {"faster": _count(known, "rtf", "faster"), "slower": _count(known, "rtf", "slower")}, "is", "are"
        )
    )
    return canvas


def _rtf(runs: Sequence[Run]) -> Canvas | None:
    """Absolute RTF of every variant with its interval, each combo beside the baseline of its own run."""
    known = [run for run in runs if run.baseline.rtf is not None and run.combo.rtf is not None]
    if not known:
        return None
    canvas, axes = listed([run.name for run in known])
    for row, run in enumerate(known):
        verdict = run.verdict("rtf")
        for variant, colour, marker, y in (
            (run.baseline, INK, "s", row - 0.14),
            (run.combo, colour_of(verdict), _marker(verdict), row + 0.14),
        ):
            rtf = _number(variant.rtf)
            bounds = variant.intervals.get("rtf") or (rtf, rtf)
            (line,) = axes.plot(bounds, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            (mark,) = axes.plot(rtf, y, marker, color=colour, markersize=6)
            whose = run.name if variant is run.combo else f"{run.reference} beside {run.name}"
            for artist in (line, mark):
                tip(artist, f"{whose}: RTF {words.with_interval('rtf', variant.rtf, variant.intervals.get('rtf'))}")
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    axes.set_xlabel("RTF: seconds of work per second of audio (lower is faster), with 95 % intervals")
    baseline = plt.Line2D([], [], color=INK, marker="s", linewidth=2, label=f"{_versus(known)}, in the same run")
    seen = dict.fromkeys(run.verdict("rtf") for run in known)
    _legend(canvas, [baseline, *(_mark(verdict, f"combo: {verdict}") for verdict in seen)])
    best = min(known, key=lambda run: run.combo.rtf or 0.0)
    ours, theirs = words.number(best.combo.rtf), words.number(best.baseline.rtf)
    axes.set_title(f"{best.name} has an RTF of {ours}, {_versus(known)} {theirs}")
    return canvas


def _stages(runs: Sequence[Run]) -> Canvas | None:
    """Where the time of an utterance goes, stacked, as shares of the same run's baseline, which is on top.

    Seconds of different runs would not do side by side: a machine is not as fast in every hour.
    """
    known = [run for run in runs if any(run.combo.stages_s.values()) and any(run.baseline.stages_s.values())]
    if not known:
        return None
    base = _shares(known[0].baseline, known[0].baseline)
    bars = _pooled([(known[0].reference, base), *((run.name, _shares(run.combo, run.baseline)) for run in known)])
    longest = max(sum(stages.values()) for _, stages in bars)
    names = dict.fromkeys(name for _, stages in bars for name in stages if name != OTHER)
    colours = dict(zip(names, STAGE_COLOURS, strict=False)) | {OTHER: PALE}
    canvas, axes = listed([name for name, _ in bars])
    for row, (label, stages) in enumerate(bars):
        left = 0.0
        for name, colour in colours.items():
            share = stages.get(name, 0.0)
            (bar,) = axes.barh(row, share, left=left, height=0.62, color=colour, edgecolor=drawing.PAGE)
            tip(bar, f"{label}: {name} {words.percent(share)}")
            left += share
        axes.text(left + 0.008 * longest, row, words.percent(left), va="center", fontsize=SMALL)
    axes.set_xlim(0, 1.12 * longest)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(
        f"time per utterance as a share of what {_versus(known)} takes in the same run; mean of the steady state"
    )
    if max(stages[OTHER] for _, stages in bars) < SLIVER * longest:
        del colours[OTHER]
    _legend(canvas, [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in colours.items()])
    largest = max(base, key=lambda name: base[name])
    axes.set_title(_stages_title(known, largest, base[largest]))
    return canvas


def _stages_title(runs: Sequence[Run], largest: str, share: float) -> str:
    if len(runs) == 1:
        whole = sum(_shares(runs[0].combo, runs[0].baseline).values())
        return f"{runs[0].name} takes {words.percent(whole)} of the time of {_versus(runs)}"
    return f"{largest} takes {words.percent(share)} of the time of {_versus(runs)}"


def _pooled(bars: Sequence[tuple[str, dict[str, float]]]) -> list[tuple[str, dict[str, float]]]:
    """Stages that are slivers of every bar are with what is no stage, which comes last."""
    longest = max(sum(stages.values()) for _, stages in bars)
    large = {name for _, stages in bars for name, share in stages.items() if share > SLIVER * longest} - {OTHER}
    return [
        (
            label,
            {name: share for name, share in stages.items() if name in large}
            | {OTHER: sum(share for name, share in stages.items() if name not in large)},
        )
        for label, stages in bars
    ]


def _shares(variant: Variant, baseline: Variant) -> dict[str, float]:
    """A variant's stages, and what else its calls take, as shares of all that the baseline's take."""
    seconds = variant.stages_s | {OTHER: max((variant.generation_time_s or 0.0) - sum(variant.stages_s.values()), 0.0)}
    whole = max(baseline.generation_time_s or 0.0, sum(baseline.stages_s.values()))  # stages may overlap
    return {name: amount / whole for name, amount in seconds.items()}


def _memory(runs: Sequence[Run]) -> Canvas | None:
    """Peak memory of combo and baseline; a white tick marks what the loaded model holds."""
    known = [run for run in runs if run.baseline.peak_memory_mb and run.combo.peak_memory_mb]
    if not known:
        return None
    known = sorted(known, key=lambda run: run.combo.peak_memory_mb or 0.0)
    canvas, axes = listed([run.name for run in known])
    for row, run in enumerate(known):
        verdict = run.verdict("peak_memory_mb")
        for variant, colour, y in ((run.baseline, PALE, row - 0.17), (run.combo, colour_of(verdict), row + 0.17)):
            (bar,) = axes.barh(y, _number(variant.peak_memory_mb), height=0.3, color=colour)
            whose = run.name if variant is run.combo else f"{run.reference} beside {run.name}"
            peak, loaded = words.megabytes(variant.peak_memory_mb), words.megabytes(variant.model_memory_mb)
            tip(bar, f"{whose}: peak {peak}, loaded model {loaded}")
            model = _number(variant.model_memory_mb)
            axes.plot([model, model], [y - 0.15, y + 0.15], color=drawing.PAGE, linewidth=2)
        note(axes, row, f"{words.megabytes(run.combo.peak_memory_mb)}  {words.verdict(verdict)}")
    kind = {"vram": "allocated on the GPU", "rss": "resident in the process"}[known[0].baseline.memory_kind]
    axes.set_xlabel(f"peak memory in MB, {kind}\ntick: the loaded model; pale: {_versus(known)}, in the same run")
    less, more = _count(known, "peak_memory_mb", "less"), _count(known, "peak_memory_mb", "more")
    axes.set_title(
        _title(known[0], "peak_memory_mb", "needs")
        if len(known) == 1
        else _of(known, {"less memory at the peak": less, "more": more}, "needs", "need")
    )
    return canvas


LOOPS: dict[str, tuple[Any, str, str]] = {
    "closed": ("-", "o", "users, each with a request on its way at any time"),
    "open": (":", "s", "at random"),
}
"""How requests come: line, mark, and in words."""


def _load(runs: Sequence[Run]) -> Canvas | None:
    """First audio against load, of every variant that was put under one; a cross is a load that it did not keep."""
    known = [run for run in runs if run.combo.loaded.get("levels") and run.baseline.loaded.get("levels")]
    if not known:
        return None
    canvas, axes = plt.subplots(figsize=(WIDTH, 5.2))
    # Runs may share a reference, whose curve is drawn once.
    variants = {run.reference: run.baseline for run in known} | {run.name: run.combo for run in known}
    handles = []
    for colour, (name, variant) in zip(cycle(STAGE_COLOURS), variants.items(), strict=False):
        handles.append(plt.Line2D([], [], color=colour, linewidth=2, label=name))
        for how, (style, marker, _) in LOOPS.items():
            levels = [one for one in variant.loaded["levels"] if one["load"] == how]
            times = [_number(one["first_p99_s"]) for one in levels]
            axes.plot([one["size"] for one in levels], times, style, color=colour, linewidth=1.8)
            for one, time in zip(levels, times, strict=True):
                (mark,) = axes.plot(one["size"], time, marker if one["kept"] else "X", color=colour, markersize=8)
                tip(mark, f"{name}, {how} loop, {one['size']:g}: {words.seconds(one['first_p99_s'])}")
    limit_s = known[0].combo.loaded["first_audio_limit_s"]
    axes.axhline(limit_s, color=RULE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("simultaneous streams")
    axes.set_ylabel(f"first audio, 99th percentile [s]; the line: {words.seconds(limit_s)}")
    axes.set_title(_load_title(known))
    for style, marker, said in LOOPS.values():
        handles.append(plt.Line2D([], [], color=NEUTRAL, linestyle=style, marker=marker, label=said))
    _legend(canvas, [*handles, plt.Line2D([], [], color=NEUTRAL, linestyle="", marker="X", label="not kept")])
    return canvas


def _load_title(runs: Sequence[Run]) -> str:
    best = max(runs, key=lambda run: run.combo.loaded["streams"] or 0)
    ours, theirs = (side.loaded["streams"] for side in (best.combo, best.baseline))
    limit = words.seconds(best.combo.loaded["first_audio_limit_s"])
    return f"{best.name} keeps {words.streams(ours)} within {limit}, {_versus([best])} {words.counted(theirs)}"


def _quality(runs: Sequence[Run]) -> Canvas | None:
    """Speed against quality: what was bought, and at what price."""
    known = [run for run in runs if run.change("rtf").low is not None and run.change("wer").low is not None]
    if not known:
        return None
    canvas, axes = plt.subplots(figsize=(WIDTH, 5.4))
    threshold = known[0].summary.thresholds["wer"]
    axes.axhspan(-threshold, threshold, color=BAND, linewidth=0)
    axes.axvline(1, color=RULE, linewidth=1)
    axes.axhline(0, color=RULE, linewidth=1)
    points = []
    for run in known:
        time, wer = run.change("rtf"), run.change("wer")
        verdict = "worse" if run.quality() == "worse" else time.verdict
        colour, x, y = colour_of(verdict), _number(time.value), _number(wer.value)
        across = axes.plot([_number(time.low), _number(time.high)], [y, y], color=colour, linewidth=1.5, alpha=0.8)
        along = axes.plot([x, x], [_number(wer.low), _number(wer.high)], color=colour, linewidth=1.5, alpha=0.8)
        mark = axes.plot(x, y, _marker(verdict), color=colour, markersize=8, markeredgecolor=drawing.PAGE)
        for artist in (*across, *along, *mark):
            tip(artist, f"{run.name}: time ratio {words.change(time)}, WER {words.change(wer)}")
        points.append((run.name, x, y))
    axes.margins(x=0.15, y=0.3)
    axes.set_xlabel(f"RTF, divided by that of {_versus(known)} (lower is faster), with 95 % intervals")
    axes.set_ylabel(f"WER, less that of {_versus(known)} (lower is better)")
    kept = sum(run.verdict("rtf") == "faster" and run.quality() == "kept" for run in known)
    worse = sum(run.quality() == "worse" for run in known)
    axes.set_title(_quality_title(known, kept, worse))
    _legend(
        canvas,
        [
            plt.Rectangle((0, 0), 1, 1, color=BAND, label=f"WER within {threshold:g}: does not count"),
            *(_mark(verdict, words_) for verdict, words_ in _meanings(known).items()),
        ],
    )
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # the labels' places hold for this layout only
    place_labels(axes, points)
    return canvas


def _quality_title(runs: Sequence[Run], kept: int, worse: int) -> str:
    if len(runs) > 1:
        return _of(runs, {"faster with quality kept": kept, "of worse quality": worse}, "is", "are")
    (run,) = runs
    return f"{run.name}: {run.verdict('rtf')}, quality {run.quality()}"


def _meanings(runs: Sequence[Run]) -> dict[str, str]:
    """Legend entries for the kinds of point that occur, keyed by a verdict of the right colour."""
    found: dict[str, str] = {}
    for run in runs:
        if run.quality() == "worse":
            found["worse"] = "quality worse"
        else:
            found[run.verdict("rtf")] = f"{run.verdict('rtf')}, quality {run.quality()}"
    return found


PARTS = {"generate_tokens": "T3", "tokens_to_mel": "flow", "mel_to_wave": "vocoder", "watermark": "watermark"}
NEAREST, FARTHEST = 1e-4, 1e2
"""Shares of a limit at which the picture ends: what lies beyond stands at its edge."""


def _fidelity(runs: Sequence[Run]) -> Canvas | None:
    return fidelity({run.name: run.fidelity for run in runs}, _versus(runs)) if runs else None


def fidelity(compared: Mapping[str, dict[str, Any]], versus: str) -> Canvas | None:
    """How far each stage is from the reference's on the same inputs, as a share of what still counts as the same.

    `compared` holds each combo's stages; None where no figure has a limit.
    """
    known = {name: stages for name, stages in compared.items() if any(_limited(stages, stage) for stage in PARTS)}
    if not known:
        return None
    size = (WIDTH * 1.1, FRAME + 0.35 + 1.3 * ROW * len(known))
    canvas = plt.figure(figsize=size)
    grid = canvas.add_gridspec(1, len(PARTS))
    whole = canvas.add_subplot(grid[:])  # it only bears the title, which is over all of them
    whole.set_axis_off()
    first = canvas.add_subplot(grid[0])
    row_of_axes = [
        first,
        *(canvas.add_subplot(place, sharex=first, sharey=first) for place in (grid[i] for i in range(1, len(PARTS)))),
    ]
    for axes, (stage, part) in zip(row_of_axes, PARTS.items(), strict=True):
        axes.axvspan(1, FARTHEST, color=BAND, linewidth=0)
        axes.axvline(1, color=RULE, linewidth=1)
        axes.annotate(part, (0.5, 1.0), (0, 5), xycoords="axes fraction", textcoords="offset points", ha="center")
        axes.tick_params(axis="y", length=0, labelleft=axes is first)
        for row, (combo, stages) in enumerate(known.items()):
            figures, verdict = _limited(stages, stage), stages.get(stage, {}).get("verdict", "")
            for number, (name, figure) in enumerate(figures.items()):
                drawn = _share_of_limit(axes, row + 0.22 * (number - (len(figures) - 1) / 2), figure, verdict)
                for artist in drawn:
                    tip(artist, f"{combo}, {part}: {words.fidelity(name, figure['mean'])}")
            if not figures:
                axes.text(NEAREST * 2, row, stats.NOT_MEASURED, va="center", fontsize=SMALL, color=SOFT)
    first.set_xscale("log")
    first.set_xlim(NEAREST / 2, FARTHEST * 2)
    first.set_xticks(
        [1e-4, 1e-2, 1, 1e2],
        ["10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FOUR}", "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT TWO}", "1", "100"],
    )
    first.minorticks_off()
    first.set_yticks(range(len(known)), list(known))
    first.set_ylim(len(known) - 0.5, -0.5)
    canvas.supxlabel("distance from the reference's stage on the same inputs, divided by its limit", fontsize=SMALL)
    verdicts = {name: [found["verdict"] for found in stages.values()] for name, stages in known.items()}
    whole.set_title(_fidelity_title(verdicts, versus), pad=26)
    marks = [
        _mark(verdict, verdict) for verdict in (FAITHFUL, DIFFERS) if any(verdict in one for one in verdicts.values())
    ]
    canvas.legend(handles=marks, loc="outside upper right", ncols=2, fontsize=SMALL)
    return canvas


def _limited(stages: Mapping[str, Any], stage: str) -> dict[str, dict[str, float | None]]:
    """A stage's figures that have a limit."""
    figures = stages.get(stage, {}).get("figures", {})
    return {name: figure for name, figure in figures.items() if figure.get("limit")}


def _share_of_limit(axes: Axes, y: float, figure: dict[str, float | None], verdict: str) -> tuple[Any, Any]:
    """One figure's mean and its interval; what is not finite was stored as null."""
    limit = figure["limit"] or 1.0
    low, mean, high = (
        FARTHEST if (value := figure[bound]) is None else min(max(value / limit, NEAREST), FARTHEST)
        for bound in ("low", "mean", "high")
    )
    (line,) = axes.plot([low, high], [y, y], color=colour_of(verdict), linewidth=2, solid_capstyle="butt")
    (mark,) = axes.plot(mean, y, _marker(verdict), color=colour_of(verdict), markersize=6)
    return line, mark


def _fidelity_title(verdicts: Mapping[str, Sequence[str]], versus: str) -> str:
    if len(verdicts) == 1:
        ((name, own),) = verdicts.items()
        return f"{name}: {own.count(FAITHFUL)} of {words.count(len(own), 'stage')} faithful to {versus}'s"
    differ = sum(DIFFERS in own for own in verdicts.values())
    disagree = f"{differ or 'none'} {words.agree(differ, 'differs', 'differ')}"
    return f"Of {words.count(len(verdicts), 'combo')}, {disagree} from {versus} in a stage"


def place_labels(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Name each point where its name covers no other: tried above, below, and further away with a line."""
    taken = [axes.transData.transform((x, y)) for _, x, y in points]
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in taken]
    for (name, *point), (x, y) in sorted(zip(points, taken, strict=True), key=lambda item: item[1][0]):
        width, height = 0.95 * SMALL * len(name), 1.9 * SMALL  # pixels of this font, on average
        for step in range(1, 40):
            distance = (1 + step // 2) * height * (1 if step % 2 else -1)
            box = (x + 8, y + distance - height / 2, x + 8 + width, y + distance + height / 2)
            if not any(_overlap(box, other) for other in boxes):
                break
        boxes.append(box)
        axes.annotate(
            name,
            (point[0], point[1]),
            (8, distance),
            textcoords="offset pixels",
            va="center",
            fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7},
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
