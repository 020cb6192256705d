"""The report's answer to "which part carries it": the way from the baseline to a combo, and who interacts with whom."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from harness import stats
from harness.ablation import Effect, group_effects
from harness.attribution import EXACT, Interaction, Measured, Model, Part, Waterfall, waterfalls
from harness.report import words
from harness.report.choice import front
from harness.report.data import Run
from harness.report.document import Block, Bullets, Fold, Heading, Paragraph, Table
from harness.report.plots import BAND, INK, NEUTRAL, PALE, SMALL, STYLE, colour_of, listed, note, place_labels, saved
from harness.report.tables import FINDABLE
from harness.report.together import as_one

METRICS = ("rtf", "peak_memory_mb", "wer")
HOLM = (
    "Verdicts among many alarm more easily than one alone, so those of one sweep, metric and place are corrected by "
    "Holm's method; the intervals are each effect's own."
)


def blocks(runs: Sequence[Run], folder: Path, suffix: str = "", heading: str | None = None) -> list[Block]:
    """What the runs of one place say: waterfalls, interactions, groups and the front, with pictures in `folder`.

    Under a heading, if one is given; nothing where the runs say nothing of these.
    """
    found: list[Block] = []
    level = 4 if heading else 3
    with plt.rc_context(STYLE):
        told = _told(runs)
        for number, waterfall in enumerate(told):
            found += [
                Heading(level, f"{_combo(waterfall, told)}: {_what(waterfall)}"),
                Paragraph(_sentence(waterfall)),
            ]
            if waterfall.kind == "ratio" and any(part.verdict != stats.NO_CHANGE for part in waterfall.parts):
                found.append(
                    saved(_waterfall(waterfall), folder / f"waterfall-{waterfall.metric}-{number}{suffix}.png")
                )
            found += [_parts(waterfall), *_interactions(waterfall)]
        combos = as_one(runs)
        groups = group_effects([combo.summary for combo in combos], METRICS, _requires(runs))
        if groups:
            found += [
                Heading(level, "What had to be left out together"),
                Bullets([_group(effect) for effect in groups]),
            ]
        front_canvas = _pareto(combos)
        if front_canvas is not None:
            found += [Heading(level, "Time, memory and quality"), saved(front_canvas, folder / f"pareto{suffix}.png")]
        found += _sets(runs)
    return [Heading(3, f"{heading[:1].upper()}{heading[1:]}"), *found] if heading and found else found


def _told(runs: Sequence[Run]) -> list[Waterfall]:
    """The waterfalls that the runs allow, of time, memory and quality."""
    measured = [Measured(run.summary, run.parameters()) for run in runs]
    return [waterfall for metric in METRICS for waterfall in waterfalls(measured, metric, _requires(runs))]


def _requires(runs: Sequence[Run]) -> dict[str, Sequence[str]]:
    return {name: needs for run in runs for name, needs in (run.job.get("requires") or {}).items()}


def _what(waterfall: Waterfall) -> str:
    return "time" if waterfall.metric == "rtf" else words.label(waterfall.metric)


def _combo(waterfall: Waterfall, told: Sequence[Waterfall]) -> str:
    """Its name, with the parameters that tell it from others of the same name."""
    others = [other.apart for other in told if other.combo == waterfall.combo and other.metric == waterfall.metric]
    own = [
        f"{words.code(name)} {words.fact(value)}"
        for name, value in waterfall.apart.items()
        if any(other.get(name) != value for other in others)
    ]
    return words.code(waterfall.combo) + (f" with {words.listing(own)}" if own else "")


def _sentence(waterfall: Waterfall) -> str:
    kind = waterfall.kind
    verb = "multiply" if kind == "ratio" else "add up"
    if waterfall.within_measured:
        fit = "The sum lies within the measured interval."
    elif waterfall.adds_up:
        fit = "What was measured lies within the sum's interval."
    else:
        fit = "Neither lies within the other's interval: conditions changed between jobs."
    how = _how(waterfall.model)
    return (
        f"Shared out by Shapley's value, {how}: the parts {verb} to {words.change(waterfall.sum, kind)}; "
        f"measured was {words.change(waterfall.total, kind)}, which leaves {_value(waterfall.remainder, kind)}. {fit}"
        f"{_foretold(waterfall)}{_mixed(waterfall)}"
    )


def _foretold(waterfall: Waterfall) -> str:
    """Whether the model told of jobs that it had not been shown."""
    if (foretold := waterfall.foretold) is None:
        return ""
    near = words.size(foretold.typical, waterfall.kind)
    said = (
        f" Told from all the others, {foretold.held} of {foretold.jobs} jobs lie within their 95 % interval, and half "
        f"of them within {near} of what was told."
    )
    return said if foretold.is_plausible else f"{said} **Those are too few: do not rely on the intervals below.**"


def _mixed(waterfall: Waterfall) -> str:
    """Which jobs are not among them, and what else those that are may differ by."""
    said = ""
    if waterfall.left_out:
        jobs, verb = words.count(waterfall.left_out, "job"), words.agree(waterfall.left_out, "is", "are")
        names = words.listing(list(map(words.code, waterfall.apart)))
        said += f" Of others, {jobs} {verb} left out, where {names} had another value."
    if len(waterfall.commits) > 1:
        said += f" The jobs are of {len(waterfall.commits)} commits: {words.listing(list(waterfall.commits))}."
    return said


def _how(model: Model) -> str:
    if model.method == EXACT:
        return f"exactly, from {model.jobs} jobs that hold every set that can be"
    if model.stages == 1:
        return f"by a Gaussian process fitted to {model.jobs} jobs"
    return f"by a Gaussian process for each of {model.stages} stages of a call, fitted to {model.jobs} jobs"


def _value(value: float, kind: str) -> str:
    return words.change(stats.Interval(value, None, None, 0), kind)


def _parts(waterfall: Waterfall) -> Table:
    kind = waterfall.kind
    rows = [
        [
            words.code(part.optimization),
            words.change(part.interval, kind),
            part.verdict,
            "" if part.smallest_detectable is None else words.size(part.smallest_detectable, kind),
        ]
        for part in _sorted(waterfall)
    ]
    rows.append(["remainder", _value(waterfall.remainder, kind), "", ""])
    rows.append(["measured together", words.change(waterfall.total, kind), "", ""])
    columns = ["optimization", f"its part, {kind} (95 % interval)", "verdict (Holm)", FINDABLE]
    return Table(columns, rows, numeric=frozenset({1, 3}))


def _sorted(waterfall: Waterfall) -> list[Part]:
    """What helps most first."""
    good_is_less = stats.metric(waterfall.metric).below in stats.GOOD
    return sorted(waterfall.parts, key=lambda part: part.interval.estimate, reverse=not good_is_less)


def _interactions(waterfall: Waterfall) -> list[Block]:
    """Those with a verdict; how many have none, and what would have been found of them."""
    decided = [one for one in waterfall.interactions if one.verdict in (*stats.GOOD, *stats.BAD)]
    others = [one for one in waterfall.interactions if one not in decided]
    strongest = sorted(decided, key=lambda one: -abs(_size(one.interval.estimate, waterfall.kind)))
    rows = [
        [" x ".join(map(words.code, one.pair)), words.change(one.interval, waterfall.kind), one.verdict]
        for one in strongest
    ]
    columns = ["interaction", f"beyond both by themselves, {waterfall.kind}", "verdict (Holm)"]
    found: list[Block] = [Table(columns, rows, numeric=frozenset({1}))] if rows else []
    if others:
        them = words.count(len(others), "other interaction" if rows else "interaction")
        told = f"{them} of two {words.agree(len(others), 'is', 'are')} not told from none by these jobs."
        found.append(Paragraph(f"{told}{_findable(others, waterfall.kind)}"))
    return found


def _findable(undecided: Sequence[Interaction], kind: str) -> str:
    sizes = sorted(one.smallest_detectable for one in undecided if one.smallest_detectable is not None)
    if not sizes:
        return ""
    half, most = words.size(sizes[(len(sizes) - 1) // 2], kind), words.size(sizes[-1], kind)
    return f" Of half of them a change of {half} would have been found, of all one of {most}."


def _size(value: float, kind: str) -> float:
    return math.log(value) if kind == "ratio" else value


def _group(effect: Effect) -> str:
    names = words.listing(list(map(words.code, (effect.optimization, *effect.along))))
    return f"{names}, because without the first the others cannot run: {words.effect(effect)}."


def _sets(runs: Sequence[Run]) -> list[Block]:
    """What the names of a screening's sets do not tell: which of its members each of them lacks."""
    sets = [run for run in runs if run.job.get("sweep") == "screening"]
    members = list(dict.fromkeys(name for run in sets for name in run.summary.enabled))
    lacking = {run.code: [name for name in members if name not in run.summary.enabled] for run in sets}
    rows = [[code, ", ".join(map(words.code, names))] for code, names in sorted(lacking.items(), key=_fewest) if names]
    return [Fold("What each set of the screening goes without", [Table(["set", "without"], rows)])] if rows else []


def _fewest(lacking: tuple[str, list[str]]) -> int:
    return len(lacking[1])


# -- pictures ----------------------------------------------------------------------------------------------------------


def _waterfall(waterfall: Waterfall) -> Canvas:
    """Each part a step from 1, the baseline, on a logarithmic axis: what multiplies is as long wherever it stands."""
    steps = [(part.optimization, part.interval.estimate, part.verdict) for part in _sorted(waterfall)]
    steps.append(("remainder", waterfall.remainder, stats.NOT_MEASURED))
    canvas, axes = listed(["baseline", *(name for name, _, _ in steps), waterfall.combo])
    axes.set_xscale("log")
    at = 1.0
    axes.plot([at, at], [-0.3, 0.3], color=INK, linewidth=2)
    for row, (name, ratio, verdict) in enumerate(steps, start=1):
        shade = PALE if name == "remainder" else colour_of(verdict)
        axes.barh(row, at * ratio - at, left=at, height=0.6, color=shade)
        axes.plot([at, at], [row - 0.7, row + 0.3], color=NEUTRAL, linewidth=0.8)
        at *= ratio
        note(axes, row, f"{words.ratio(ratio)}  {verdict if name != 'remainder' else ''}")
    last = len(steps) + 1
    low, high = waterfall.total.bounds or (at, at)
    axes.axvspan(low, high, color=BAND, linewidth=0, zorder=0)
    axes.plot([at, at], [last - 0.7, last + 0.3], color=INK, linewidth=2)
    note(axes, last, words.change(waterfall.total))
    axes.use_sticky_edges = False  # bars would end where the picture does
    axes.margins(x=0.03)
    _ticks(axes)
    axes.set_xlabel(
        f"{words.label(waterfall.metric)}, share of the baseline's (logarithmic; band: the measured interval)"
    )
    first = steps[0]
    axes.set_title(f"{waterfall.combo}: of {_what(waterfall)}, {first[0]} carries the most ({words.ratio(first[1])})")
    return canvas


def _ticks(axes: Axes) -> None:
    """Five round figures along a logarithmic axis, however short it is."""
    places = [float(f"{value:.2g}") for value in np.geomspace(*axes.get_xlim(), 7)[1:-1]]
    axes.minorticks_off()
    axes.set_xticks(places, [f"{place:g}" for place in places])


def _pareto(runs: Sequence[Run]) -> Canvas | None:
    """Time against memory: what is on the front is named, and quality that is worse is marked."""
    known = [
        run
        for run in runs
        if run.summary.status == "ok" and run.change("rtf").value is not None and run.combo.peak_memory_mb is not None
    ]
    best = front(known)
    if len(known) < 3 or len(best) < 2:
        return None
    canvas, axes = plt.subplots(figsize=(9.0, 5.4))
    chosen = {run.summary.run_id for run in best}
    for run in known:
        on_front = run.summary.run_id in chosen
        x, y = run.change("rtf").value or 0.0, run.combo.peak_memory_mb or 0.0
        shade = colour_of("worse") if run.quality() == "worse" else colour_of("faster") if on_front else PALE
        axes.plot(x, y, "o" if on_front else ".", color=shade, markersize=8, markeredgecolor="white")
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("RTF, combo / baseline (lower is faster)")
    axes.set_ylabel("peak memory, MB")
    axes.set_title(f"Of {len(known)} combos {len(best)} are bettered by none in time, memory and quality at once")
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    labels = [(run.name, run.change("rtf").value or 0.0, run.combo.peak_memory_mb or 0.0) for run in best]
    place_labels(axes, labels)
    axes.annotate("blue: on the front; vermilion: quality worse", (0, -0.16), xycoords="axes fraction", fontsize=SMALL)
    return canvas
