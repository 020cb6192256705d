"""The runs a report is about, and the questions that its sections ask of them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from harness import stats
from harness.quality.fidelity import DIFFERS, judged
from harness.report import words
from harness.results import BASELINE, MERGED, SIMILARITY, Comparison, RunFolder, Summary, Variant
from harness.sampling import overrides

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

KEPT = "kept"
PER_PROCESS = ("first_call_s", "load_s", "model_memory_mb")
"""Figures that a process has once; where memory is a process's resident set, its peak is another."""


@dataclass(frozen=True)
class Run:
    """A run's summary, and what its folder says about configuration and environment (empty if not kept)."""

    summary: Summary
    job: dict[str, Any]
    environment: dict[str, Any]
    path: Path

    # -- what was compared, and where --------------------------------------------------------------------------------

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
    def reference(self) -> str:
        """The name of what the combo is compared with."""
        return self.summary.against

    @property
    def versus(self) -> str:
        """The reference in a sentence."""
        return "the baseline" if self.reference == BASELINE else words.code(self.reference)

    @property
    def place(self) -> str:
        """Where absolute figures may be compared: one pipeline on one device."""
        return words.said(f"the {self.summary.pipeline} pipeline on {self.summary.device}")

    @property
    def fidelity(self) -> dict[str, Any]:
        """Each stage's figures, by today's limits; empty where stages were not compared."""
        return judged(self.summary.fidelity)

    @property
    def is_faithful(self) -> bool:
        """Whether no stage was found to differ from the reference's."""
        return all(stage["verdict"] != DIFFERS for stage in self.fidelity.values())

    @property
    def setting(self) -> str:
        """Where ratios may be compared: one place, against one reference."""
        setting = self.place if self.reference == BASELINE else f"{self.place}, against {self.versus}"
        return f"{setting}, host {words.said(self.host)}" if self.host else setting

    @property
    def host(self) -> str | None:
        """In a folder that joins several hosts' runs (`harness.merge`), which of them it is from."""
        source = self.path.absolute().parent
        return source.name if (source.parent / MERGED).is_file() else None

    @property
    def baseline(self) -> Variant:
        """The reference's figures."""
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
    def standing(self) -> str:
        """ "ok", or what takes weight from all its figures: "incomplete", or "inactive" where nothing was active."""
        summary = self.summary
        doubts = [] if summary.status == "ok" else [summary.status]
        if not summary.active:
            doubts += dict.fromkeys(summary.optimizations[name]["status"] for name in summary.enabled)
        return ", ".join(doubts) or "ok"

    @property
    def doubt(self) -> str:
        """Its standing, in brackets behind its name; nothing where it is ok."""
        return "" if self.standing == "ok" else f" ({self.standing})"

    @property
    def is_noise_floor(self) -> bool:
        """Identical code against itself."""
        return not self.summary.enabled and self.reference == BASELINE

    # -- what was found ----------------------------------------------------------------------------------------------

    @property
    def similarity(self) -> list[str]:
        """The similarities of the quality pass; those of clips that were timed have names of their own."""
        return [name for name in self.summary.comparison if name.startswith(SIMILARITY) and not is_timed(name)]

    @property
    def quality_metrics(self) -> list[str]:
        return ["wer", *self.similarity]

    @property
    def timed_metrics(self) -> list[str]:
        """What was heard of clips that were timed: those that were measured."""
        return [name for name in self.summary.comparison if is_timed(name) and self.change(name).value is not None]

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Of each optimization, as job.yaml has them; empty where it was not kept."""
        settings = self.job.get("optimizations") or {}
        return {name: {key: kept[key] for key in kept if key != "enabled"} for name, kept in settings.items() if kept}

    def pipeline_overrides(self) -> list[str]:
        """The words of a command line that ask for the pipeline, and for what it is asked."""
        return overrides(self.job.get("pipeline") or {"name": self.summary.pipeline})

    def change(self, metric: str) -> Comparison:
        return self.summary.comparison[metric]

    def verdict(self, metric: str) -> str:
        return self.summary.comparison[metric].verdict if metric in self.summary.comparison else stats.NOT_MEASURED

    def told_and_judged(self, metric: str) -> str:
        """The change with its interval and verdict; "not measured" where there is none."""
        record = self.summary.comparison.get(metric)
        if record is None or record.value is None:
            return words.NOT_MEASURED
        return f"{self.told(metric)}, {words.verdict(record.verdict)}"

    def told(self, metric: str) -> str:
        """The change with its interval, which a figure that a process has once does not get from a single pair."""
        record = self.change(metric)
        if record.value is None or self.summary.processes > 1 or not self.is_per_process(metric):
            return words.change(record)
        return words.change(replace(record, low=None, high=None))

    def quality(self) -> str:
        """ "kept", "no detectable change", "worse" or "not measured".

        Kept means that the intervals rule out a loss that counts; untrained weights have no quality to keep. Clips
        that were timed are few and have to show no loss; so has the watermark. A combo that runs into the limit of
        speech tokens more often than the baseline is worse, whatever was heard.
        """
        verdicts = [self.verdict(name) for name in (*self.quality_metrics, *self.timed_metrics, "watermark")]
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

    def is_per_process(self, metric: str) -> bool:
        """Whether a process has this figure once, so that only repeated processes give it an interval."""
        return metric in PER_PROCESS or (metric == "peak_memory_mb" and self.baseline.memory_kind == "rss")


def is_timed(metric: str) -> bool:
    return metric.endswith("_timed")


def load(folders: Sequence[RunFolder]) -> list[Run]:
    """Raises UserError for a run whose summary cannot be read."""
    return [
        Run(folder.summary(), folder.job(), folder.read_json("environment.json"), folder.path) for folder in folders
    ]


def by_place(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return grouped(runs, lambda run: run.place)


def by_device(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """A device of another host is another one."""
    return grouped(runs, lambda run: words.said(", ".join(filter(None, (run.summary.device, run.host)))))


def by_pipeline(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return grouped(runs, lambda run: run.summary.pipeline)


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return grouped(runs, lambda run: run.setting)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items of each key, in the order of its first."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def ranked(runs: Sequence[Run]) -> list[Run]:
    """Fastest first; runs without a time ratio last."""

    def key(run: Run) -> float:
        value = run.change("rtf").value
        return float("inf") if value is None else value

    return sorted(runs, key=key)
