"""A paired experiment: a reference, which is the baseline or any combo, and one combo, side by side on one device.

    load       each in its own process; both stay alive, and while one works the other is idle
    first      the first call of each, on equal work
    warmup     the same call a few times more, on its way to the steady state
    quality    every text with every seed, running free; this also counts the reference's tokens
    speed      every text held to the reference's token count, round after round, the order flipping (ABBA)
    evidence   what each optimization shows for having been active
    fidelity   each stage on the reference's own inputs, for a few texts; behind the evidence, which it would change
    scoring    WER and similarity of the quality pass, once nothing is timed any more

Whatever happens to a child becomes rows and records of the run's folder. What was measured before, and what
the other child measures after, is kept.

What one call speaks, and in which figures the two are compared, is the scenario's (`harness.scenarios`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch

from harness import environment, measure
from harness.config import JobSpec
from harness.console import Progress
from harness.devices import leased, visible_gpus
from harness.errors import UserError
from harness.later import is_later, pack
from harness.ledger import Ledger
from harness.plugins import import_catalogue
from harness.quality.judges import check_judges
from harness.quality.replay import Case
from harness.quality.scoring import score_run
from harness.quality.stages import compare_stages
from harness.results import Measurement, RunFolder, Summary
from harness.scenarios import Call, Request, Turn, scenario
from harness.side import Side
from harness.summarize import build_summary
from harness.worker import Order, Setup
from harness.workload import Item, Workload, fit_voices, load_workload

UNTRAINED = "the checkpoint's weights come from a seed, so it cannot speak"


def run(
    spec: JobSpec, results: Path, progress: Progress, started: float | None = None, held: str | None = None
) -> Summary:
    """Measure one combo against its reference and leave a run's folder under `results`, its summary included.

    `started` is when the job's clock began (`time.monotonic`), for a caller that has prepared before, and `held` the
    device that it holds for the job (`harness.devices.leased`). Raises UserError for what a user can put right.
    Whatever it raises, a folder is left only if something was measured.
    """
    device = resolve_device(spec.config["device"])
    workload = load_workload(spec.config["workload"])
    scenario(workload.scenario).check(spec.config["measure"])
    lease = leased(device, lambda: progress(f"waiting until no other job measures on {device}", 0, 0))
    is_held = held is not None and held.startswith(device.partition(":")[0])  # PyTorch may not see the driver's GPU
    with nullcontext() if is_held else lease:
        ledger = Ledger(started)
        folder = RunFolder.create(results, spec.combo, spec.config["pipeline"]["name"])
        folder.write_job(spec.config)
        experiment = Experiment(spec, workload, device, folder, ledger, progress)
        try:
            experiment.measure()
            experiment.close()
            experiment.score()
        except BaseException:  # a user's mistake, Ctrl-C, or a defect
            experiment.close()
            if experiment.spoken:  # what was measured is kept
                experiment.summarize()
            else:
                shutil.rmtree(folder.path)
            raise
        return experiment.summarize()


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where PyTorch sees one, else cpu. Raises UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or not index):
        raise UserError(f"device={device}: there is auto, cpu, cuda and cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; try device=cpu")
    return device


class Experiment:
    """One job on its way: two sides, the files they fill, and what is known so far."""

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
        self.items, self.seeds = list(workload.items), list(workload.seeds)
        self.scenario = scenario(workload.scenario)
        self.reference = Side(spec.against, spec.against_toggles)
        self.candidate = Side(spec.combo, spec.toggles)
        self.sides = {side.name: side for side in (self.reference, self.candidate)}
        self.pinned: dict[Item, int] = {}
        self.warnings = list(workload.warnings)
        self.spoken = 0

    def measure(self) -> None:
        """Everything that needs the children. Raises UserError for what they cannot be given."""
        if not self.load():
            return
        self.make_plan()
        if self.speaks:
            check_judges(self.spec.config["quality"])
        watch = measure.CpuWatch([side.pid for side in self.sides.values()])
        states = [self.device_state()]
        self.first_calls()
        if self.speaks:
            self.quality_pass()
        for _ in self.speed_rounds():
            states.append(self.device_state())
        self.collect_evidence()
        self.compare_stages()
        self.warnings += watch.warnings() if self.device == "cpu" else []
        self.warnings += measure.state_warnings(states, n_own=len(self.sides))

    # -- before anything is spoken ------------------------------------------------------------------------------------

    def load(self) -> bool:
        """Load one side after the other; False if one is missing, for the other could not be paired."""
        device: dict[str, Any] = {"name": self.device}
        voices: list[str] = []
        for side in self.sides.values():
            self.report(f"loading {side.name}")
            with self.ledger.book("loading_s"):
                loaded = side.load(self.setup(side), self.settings["load_limit_s"])
            if loaded is None:
                break
            device, voices = loaded
        self.folder.write_json("environment.json", environment.describe(self.spec.config_hash, device))
        if any(side.child.status == "failed" for side in self.sides.values()):
            for side in self.sides.values():
                if side.child.status == "ok":
                    side.child.fail("not measured: the other process could not load")
            return False
        self.write_records()
        self.items, replaced = fit_voices(self.items, voices)
        self.warnings += replaced
        return True

    def setup(self, side: Side) -> Setup:
        """What a side's process is given."""
        pipeline, modules = self.spec.config["pipeline"], self.spec.config["plugin_modules"]
        catalogue = import_catalogue(modules)
        variables = visible_gpus()
        for plugin, params in side.toggles.items():
            variables |= catalogue.create(plugin, params).environment()
        return Setup(
            variant=side.name,
            folder=self.folder.path,
            loader=pipeline["loader"],
            loader_arguments={key: pipeline[key] for key in ("name", "checkpoint_dir", "seed")},
            device=self.device,
            plugins=side.toggles,
            plugin_modules=tuple(modules),
            environment=variables,
            threads=pipeline["threads"],
        )

    @property
    def speaks(self) -> bool:
        """Whether there is anything to understand."""
        return all(side.child.trained for side in self.sides.values())

    @property
    def shares(self) -> dict[str, list[Item]]:
        """What each side speaks in a round."""
        return {
            side.name: self.scenario.share(self.items, bool(side.toggles), self.settings)
            for side in self.sides.values()
        }

    @property
    def turns(self) -> list[Turn]:
        """The calls of a round."""
        return self.scenario.turns(self.shares)

    def make_plan(self) -> None:
        """Rows expected per side and pass, and the token counts that are known before anything has spoken."""
        own_warmup = self.scenario.own_warmup(self.shares)
        for name, items in self.shares.items():
            plan = self.sides[name].plan
            plan.first = 1
            plan.warmup = self.settings["warmup_calls"] * (1 + sum(len(turn[name]) for turn in own_warmup))
            plan.speed = len(items) * self.scenario.least_rounds(self.settings)
            plan.quality = len(items) * len(self.seeds) if self.speaks else 0
        if remark := self.scenario.remark(self.shares):
            self.warnings.append(remark)
        if not self.speaks:
            per_character = self.settings["tokens_per_character"]
            self.pinned = {item: max(1, round(per_character * len(item.text))) for item in self.items}
            for side in self.sides.values():
                side.child.quality_unmeasured_reason = UNTRAINED
        if tokens := self.settings["pinned_tokens"]:
            self.pinned = dict.fromkeys(self.items, tokens)
        self.write_plan()

    # -- the passes ---------------------------------------------------------------------------------------------------

    def first_calls(self) -> None:
        """The first call and the warm-up calls: one text, the candidate held to what the reference said."""
        first, pins = self.items[0], dict(self.pinned)
        for number in range(1 + self.settings["warmup_calls"]):
            for position, side in enumerate(self.sides.values()):
                request = Request(first, self.seeds[0], pins.get(first))
                call = Call(side.name, "warmup" if number else "first", (request,), number, position)
                for row in self.speak(call):
                    if row.n_tokens and not number:
                        pins.setdefault(first, row.n_tokens)
                        side.count_first_utterance(row)

    def quality_pass(self) -> None:
        """Every text with every seed, each side stopping by itself. The first seed's count will be pinned."""
        for seed, turn in product(self.seeds, self.turns):
            for position, (name, items) in enumerate(turn.items()):
                requests = tuple(Request(item, seed) for item in items)
                rows = self.speak(Call(name, "quality", requests, position=position, keep=True))
                for item, row in zip(items, rows, strict=False):
                    if row.n_tokens and (name == self.reference.name or item not in turn[self.reference.name]):
                        self.pinned.setdefault(item, row.n_tokens)

    def speed_rounds(self) -> Iterator[int]:
        """Every text in every round, equal work for both, neighbours in time, the order flipping.

        Rounds are added while the budget lasts; the minimum is kept whatever it takes.
        """
        for number, turn in product(range(self.settings["warmup_calls"]), self.scenario.own_warmup(self.shares)):
            self.take_turn(turn, "warmup", number, first=self.reference.name)
        start, least = time.monotonic(), self.scenario.least_rounds(self.settings)
        for number in range(max(least, self.settings["max_rounds"])):
            spent = time.monotonic() - start
            if number >= least and spent * (number + 1) / number > self.settings["budget_s"]:
                break
            for name, items in self.shares.items():
                self.sides[name].plan.speed = len(items) * max(number + 1, least)
            self.write_plan()
            for index, turn in enumerate(self.turns):
                first = self.reference if (number + index) % 2 == 0 else self.candidate
                self.take_turn(turn, "speed", number, first=first.name)
            yield number

    def take_turn(self, turn: Turn, step: str, number: int, first: str) -> None:
        """A call by each side, held to the numbers of tokens that are known; what has none is left out."""
        for position, name in enumerate(sorted(turn, key=lambda name: name != first)):
            known = [item for item in turn[name] if item in self.pinned]
            requests = tuple(Request(item, self.seeds[0], self.pinned[item]) for item in known)
            if requests:
                self.speak(Call(name, step, requests, number, position))

    def collect_evidence(self) -> None:
        """Ask the optimizations for what they have to show."""
        with self.ledger.book("evidence_s"):
            for side in self.sides.values():
                side.collect_evidence(self.settings["call_limit_s"])

    def compare_stages(self) -> None:
        """Give each stage of both sides the reference's own inputs, and write down how far apart they are."""
        n_texts = self.spec.config["quality"].get("fidelity_texts", 0)
        if not n_texts or not all(side.alive for side in self.sides.values()):
            return
        self.report("comparing stages")
        cases = [Case(item.text_id, item.text, item.voice, self.pinned.get(item)) for item in self.items[:n_texts]]
        limit_s = self.settings["call_limit_s"] * (1 + len(cases))
        with self.ledger.book("scoring_s"):
            found = compare_stages(self.folder.path, self.reference, self.candidate, cases, self.seeds[0], limit_s)
        self.folder.write_json("fidelity.json", found)

    # -- one call -----------------------------------------------------------------------------------------------------

    def speak(self, call: Call) -> list[Measurement]:
        """Have a call answered, and write its rows; none once the side's process has ended."""
        side = self.sides[call.variant]
        if not side.alive:
            return []
        self.report(f"{call.step} {'pass' if call.step in ('speed', 'quality') else 'call'}, {call.variant}")
        started_s = self.ledger.elapsed_s
        limit_s = self.settings["call_limit_s"] * len(call.requests)
        answers = side.ask(self.scenario.method, self.orders(call), limit_s=limit_s)
        if answers is None:
            wall_s = (self.ledger.elapsed_s - started_s) / len(call.requests)
            lost = {"status": "failed", "error": side.last_error, "batch_size": len(call.requests), "wall_s": wall_s}
            answers = [dict(lost) for _ in call.requests]
        self.ledger.measured_s += sum(answer.pop("wall_s") for answer in answers)
        rows = self.scenario.rows(call, answers, started_s)
        for row in rows:
            self.folder.add_measurement(row)
        self.spoken += len(rows)
        return rows

    def orders(self, call: Call) -> list[Order]:
        """What the side's process is told of a call."""
        orders = []
        for request in call.requests:
            item = request.item
            clip = self.folder.clip(call.variant, item.text_id, item.voice, request.seed)
            orders.append(
                Order(item.text, item.voice, request.seed, request.n_tokens, str(clip) if call.keep else None)
            )
        return orders

    def device_state(self) -> dict[str, Any]:
        """Clocks and the like, as the first process that is alive sees them."""
        alive = next((side for side in self.sides.values() if side.alive), None)
        return (alive.ask("state", limit_s=self.settings["call_limit_s"]) or {}) if alive else {}

    def report(self, phase: str) -> None:
        self.progress(phase, self.spoken, sum(side.plan.total for side in self.sides.values()))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave no child behind."""
        for side in self.sides.values():
            side.stop()

    def score(self) -> None:
        """WER and similarity of what the quality pass left; nothing is timed any more, so on all cores."""
        if self.reference.plan.quality:
            self.report("scoring")
            with self.ledger.book("scoring_s"):
                if is_later(self.folder):
                    pack(self.folder)
                else:
                    score_run(self.folder, self.spec.config["quality"])

    def summarize(self) -> Summary:
        """Write the side files and, last, the summary, of whatever is there."""
        self.write_records()
        self.folder.write_json("timing.json", {**self.ledger.read(), "warnings": self.warnings})
        summary = build_summary(self.folder)
        timing = self.ledger.read()  # once more: now the summary's own time is in it
        self.folder.write_json("timing.json", {**timing, "warnings": self.warnings})
        summary.timing = {name: timing[name] for name in summary.timing}
        self.folder.write_summary(summary)
        return summary

    def write_records(self) -> None:
        """What is known of the children; also before the end, which not every run lives to see."""
        self.folder.write_json("children.json", {side.name: side.child.to_dict() for side in self.sides.values()})
        names = import_catalogue(self.spec.config["plugin_modules"]).names()
        statuses = {side.name: side.statuses_of(names) for side in self.sides.values()}
        self.folder.write_json("optimizations.json", statuses)

    def write_plan(self) -> None:
        self.folder.write_json("plan.json", {side.name: side.plan.to_dict() for side in self.sides.values()})
