"""The calibration curve as a picture: how far words and voice move, over how far a stage is from the unharmed one."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import stats
from harness.report import plots
from harness.report.drawing import BAND, RULE
from harness.report.plots import BAD, GOOD, NEUTRAL, SMALL, plt

AXES = {
    "generate_tokens": ("kl_mean", "T3: mean KL divergence, nats"),
    "tokens_to_mel": ("mel_error", "flow: relative error of the mel"),
    "mel_to_wave": ("wave_distance_db", "vocoder: log-spectral distance, dB"),
}
COLOURS = {"harmed": BAD, "unharmed": GOOD, "unknown": NEUTRAL}
MEANINGS = {"unharmed": "proved harmless", "unknown": "nobody can tell", "harmed": "proved harmful"}
MARKERS = {"steps": "s", "noise": "o", "bits": "D"}
WHAT = {"steps": "fewer solver steps", "noise": "noise on weights", "bits": "weights in fewer bits"}
SHOWN_WER = 0.3
"""Beyond this the picture says nothing more: what is above stands at its edge."""


def draw(
    entries: Sequence[Mapping[str, Any]],
    limits: Mapping[str, Mapping[str, float | None]],
    harms: Sequence[str],
    path: Path,
) -> None:
    """Each damage as a point with its interval; `harms` are what is known of each, the dotted line is the limit."""
    with plt.rc_context(plots.STYLE):
        canvas, grid = plt.subplots(2, len(AXES), figsize=(plots.WIDTH * 1.25, 6.2), sharex="col", sharey="row")
        for column, (stage, (figure, label)) in enumerate(AXES.items()):
            own = [pair for pair in zip(entries, harms, strict=True) if pair[0]["stage"] == stage]
            for axes, metric in zip(grid[:, column], ("wer", "similarity"), strict=True):
                threshold = (stats.METRICS["wer"] if metric == "wer" else stats.SIMILARITY).threshold
                axes.axhspan(-threshold, threshold, color=BAND, linewidth=0)
                axes.axhline(0, color=RULE, linewidth=1)
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
                axes.xaxis.set_minor_formatter("")
                for entry, harm in own:
                    _point(axes, entry, figure, metric, COLOURS[harm])
                if limit := limits[stage][figure]:
                    axes.axvline(limit, color=GOOD, linestyle=":", linewidth=1.5)
            grid[1, column].set_xlabel(label)
        grid[0, 0].set_ylabel("word error rate, change")
        grid[1, 0].set_ylabel("similarity, change")
        grid[0, 0].set_ylim(-0.06, SHOWN_WER * 1.05)
        grid[0, 0].set_title("Where words and voice begin to suffer, stage by stage")
        marks = [plt.Line2D([], [], color=NEUTRAL, marker=MARKERS[one], linestyle="", label=WHAT[one]) for one in WHAT]
        lines = [plt.Line2D([], [], color=COLOURS[one], linewidth=3, label=MEANINGS[one]) for one in MEANINGS]
        dotted = plt.Line2D([], [], color=GOOD, linestyle=":", linewidth=1.5, label="limit")
        canvas.legend(handles=[*lines, dotted, *marks], loc="outside lower center", ncols=7, fontsize=SMALL - 1)
        canvas.savefig(path)
        plt.close(canvas)


def _point(axes: plt.Axes, entry: Mapping[str, Any], figure: str, metric: str, colour: str) -> None:
    amount, moved = entry["fidelity"][figure]["mean"], entry[metric]
    if amount is None or not math.isfinite(amount) or moved["low"] is None:
        return
    shown = [min(moved[bound], SHOWN_WER) if metric == "wer" else moved[bound] for bound in ("low", "mean", "high")]
    axes.plot([amount, amount], [shown[0], shown[2]], color=colour, linewidth=1.5)
    axes.plot(amount, shown[1], MARKERS[entry["family"].rsplit("_", 1)[1]], color=colour, markersize=6)
