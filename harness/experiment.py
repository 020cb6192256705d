"""What an experiment knows while it goes on, and the files that it fills.

The order of things is elsewhere: `harness.job` repeats pairs of processes, `harness.pair` takes one through its passes.
"""

from __future__ import annotations

from typing import Any

from harness import environment, measure
from harness.config import JobSpec
from harness.console import Progress
from harness.draws import Draws
from harness.hearing import Listener, Memory
from harness.ledger import Ledger
from harness.plugins import import_catalogue
from harness.quality.judges import check_judges
from harness.records import Child, Plan
from harness.results import Measurement, RunFolder, Summary
from harness.scenarios import scenario
from harness.side import Side
from harness.summarize import build_summary
from harness.workload import Item, Workload, fit_voices


class Experiment:
    """One experiment: its settings, its files, and what is known so far.

    `toggles` holds what each variant switches on, the reference first; `counts` how many tokens an item takes where
    the reference stops by itself; `sides` the processes that live, `children` the records of all there have been.
    """

    def __init__(
        self,
        spec: JobSpec,
        workload: Workload,
        device: str,
        folder: RunFolder,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.spec, self.device = spec, device
        self.folder, self.ledger, self.progress = folder, ledger, progress
        self.settings = spec.config["measure"]
        self.processes = self.settings.get("processes", 1)
        self.items, self.seeds = list(workload.items), list(workload.seeds)
        self.scenario = scenario(workload.scenario)
        self.toggles = {spec.against: spec.against_toggles, spec.combo: spec.toggles}
        self.draws = Draws(self.settings.get("requests_seed"), taken=workload.seeds)
        self.counts: dict[Item, int] = {}
        self.memory = Memory()
        self.plans = {name: Plan() for name in self.toggles}
        self.children: dict[str, list[Child]] = {name: [] for name in self.toggles}
        self.statuses: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.toggles}
        self.sides: dict[str, Side] = {}
        self.speaks = False
        self.sample_rate: int | None = None
        self.warnings = list(workload.warnings)
        self.conditions: list[dict[str, Any]] = []
        self.spoken = 0

    def begin_pair(self) -> dict[str, Side]:
        """A fresh side for each variant, the reference first."""
        self.sides = {
            name: Side(name, toggles, self.device, Listener(self.memory, is_reference=name == self.spec.against))
            for name, toggles in self.toggles.items()
        }
        for side in self.sides.values():
            self.children[side.name].append(side.child)
        return self.sides

    def end_pair(self) -> None:
        """Leave no child behind, and keep what is known of those there were."""
        for side in self.sides.values():
            side.stop()
        self.statuses, self.sides = self.all_statuses(), {}
        self.write_records()

    def describe(self, device: dict[str, Any]) -> None:
        """Write what runs where."""
        self.folder.write_json("environment.json", environment.describe(self.spec.config_hash, device))

    def fit(self, voices: list[str], trained: bool) -> None:
        """Fit the workload to the checkpoint, whose voices are given. Raises UserError for one that it cannot speak."""
        self.items, replaced = fit_voices(self.items, voices)
        self.speaks = trained
        self.warnings += replaced
        if trained:
            check_judges(self.spec.config["quality"])
        else:
            per_character = self.settings["tokens_per_character"]
            self.counts |= {item: max(1, round(per_character * len(item.text))) for item in self.items}
        if tokens := self.settings["pinned_tokens"]:
            self.counts |= dict.fromkeys(self.items, tokens)
        if remark := self.scenario.remark(self.shares):
            self.warnings.append(remark)

    @property
    def shares(self) -> dict[str, list[Item]]:
        """What each variant speaks in a round."""
        return {
            name: self.scenario.share(self.items, bool(toggles), self.settings)
            for name, toggles in self.toggles.items()
        }

    def add(self, rows: list[Measurement]) -> None:
        """Write the rows of a call."""
        for row in rows:
            self.folder.add_measurement(row)
        self.spoken += len(rows)

    def report(self, phase: str) -> None:
        self.progress(phase, self.spoken, sum(plan.total for plan in self.plans.values()))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all children; only then tell the requests' seed, and hold the files against what was written to them."""
        self.end_pair()
        self.folder.write_json("requests.json", {"seed": self.draws.seed})
        if (altered := self.folder.altered()) and self.children[self.spec.combo]:
            self.children[self.spec.combo][-1].fail(f"{altered} was changed while the job went on, and not by it.")

    def summarize(self) -> Summary:
        """Write the side files and, last, the summary, of whatever is there."""
        self.write_records()
        self.folder.write_json("conditions.json", {"rounds": self.conditions})
        self.warnings += measure.state_warnings(self.conditions, n_own=len(self.toggles))
        self.folder.write_json("timing.json", {**self.ledger.read(), "warnings": self.warnings})
        summary = build_summary(self.folder)
        timing = self.ledger.read()  # once more: now the summary's own time is in it
        self.folder.write_json("timing.json", {**timing, "warnings": self.warnings})
        summary.timing = {name: timing[name] for name in summary.timing}
        self.folder.write_summary(summary)
        return summary

    def write_records(self) -> None:
        """What is known of the children; also before the end, which not every run lives to see."""
        records = {name: [child.to_dict() for child in children] for name, children in self.children.items()}
        self.folder.write_json("children.json", records)
        self.folder.write_json("optimizations.json", self.all_statuses())

    def all_statuses(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What became of each optimization, in the processes that have ended and those that live."""
        names = import_catalogue(self.spec.config["plugin_modules"]).names()
        now = {side.name: side.statuses_of(names) for side in self.sides.values()}
        return {name: worst(before, now.get(name, before)) for name, before in self.statuses.items()}

    def write_plan(self) -> None:
        self.folder.write_json("plan.json", {name: plan.to_dict() for name, plan in self.plans.items()})


def worst(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each optimization's statuses in two processes the one that is not active, the earlier if both are alike."""
    return {name: before[name] if name in before and before[name]["status"] != "active" else now[name] for name in now}
