"""The runs a report is about, and the questions that its sections ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import stats
from harness.report import words
from harness.results import Comparison, RunFolder, Summary, Variant

KEPT = "kept"


@dataclass(frozen=True)
class Run:
    """A run's summary, and what its folder says about configuration and environment (empty if not kept)."""

    summary: Summary
    job: dict[str, Any]
    environment: dict[str, Any]
    path: Path

    @property
    def name(self) -> str:
        return self.summary.combo

    @property
    def code(self) -> str:
        """The name in a sentence, set as code."""
        return words.code(self.name)

    @property
    def title(self) -> str:
        """The name where nothing sets it off."""
        return words.said(self.name)

    @property
    def place(self) -> str:
        """Where absolute figures may be compared: one pipeline on one device."""
        return words.said(f"the {self.summary.pipeline} pipeline on {self.summary.device}")

    @property
    def baseline(self) -> Variant:
        return self.summary.reference

    @property
    def combo(self) -> Variant:
        """The optimized variant; an empty one if the run ended before it left anything."""
        candidate = self.summary.candidate
        return self.summary.variants[candidate] if candidate else Variant(status="failed", error="it left no rows")

    @property
    def failed(self) -> bool:
        return self.summary.status == "failed"

    @property
    def is_noise_floor(self) -> bool:
        """Identical code against itself."""
        return not self.summary.enabled

    @property
    def similarity(self) -> list[str]:
        return [name for name in self.summary.comparison if name.startswith("sim_")]

    @property
    def quality_metrics(self) -> list[str]:
        return ["wer", *self.similarity]

    def change(self, metric: str) -> Comparison:
        return self.summary.comparison[metric]

    def verdict(self, metric: str) -> str:
        return self.summary.comparison[metric].verdict if metric in self.summary.comparison else stats.NOT_MEASURED

    def quality(self) -> str:
        """ "kept", "no detectable change", "worse" or "not measured".

        Kept means that the intervals rule out a loss that counts; untrained weights have no quality to keep. A combo
        that runs into the limit of speech tokens more often than the baseline is worse, whatever was heard.
        """
        verdicts = [self.verdict(name) for name in self.quality_metrics]
        if "worse" in verdicts or self.is_cut_off_more():
            return "worse"
        if self.verdict("wer") == stats.NOT_MEASURED or not self.baseline.trained:
            return stats.NOT_MEASURED
        return KEPT if all(self._proved(name) for name in self.quality_metrics) else stats.NO_CHANGE

    def is_cut_off_more(self) -> bool:
        """Whether the combo ran into the limit of speech tokens in a larger share of its clips than the baseline."""
        before, after = (
            (variant.heard.get("n_hit_token_cap") or 0) / max(1, variant.n_scored)
            for variant in (self.baseline, self.combo)
        )
        return after > before

    def _proved(self, metric: str) -> bool:
        record, threshold = self.change(metric), self.summary.thresholds[metric]
        return stats.proves_no_worse(record.low, record.high, threshold, stats.metric(metric))

    def gains(self) -> list[str]:
        """What the combo is better at: "faster", "less memory"."""
        return [
            word
            for word, metric, good in (("faster", "rtf", "faster"), ("less memory", "peak_memory_mb", "less"))
            if self.verdict(metric) == good
        ]


def load(folders: Sequence[RunFolder]) -> list[Run]:
    """Raises UserError for a run whose summary cannot be read."""
    return [
        Run(folder.summary(), folder.job(), folder.read_json("environment.json"), folder.path) for folder in folders
    ]


def by_place(runs: Sequence[Run]) -> dict[str, list[Run]]:
    places: dict[str, list[Run]] = {}
    for run in runs:
        places.setdefault(run.place, []).append(run)
    return places


def ranked(runs: Sequence[Run]) -> list[Run]:
    """Fastest first; runs without a time ratio last."""

    def key(run: Run) -> float:
        value = run.change("rtf").value
        return float("inf") if value is None else value

    return sorted(runs, key=key)
