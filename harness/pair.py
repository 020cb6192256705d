"""One pair of processes, the reference's and the combo's, from their loading to their last call.

    load       one after the other; both stay alive, and while one works the other is idle
    first      the first call of each, on equal work
    warmup     more calls with seeds and lengths of their own, on the way to the steady state
    quality    every text with every seed, running free; this also counts the reference's tokens (first pair only)
    speed      every text in every round, the order flipping (ABBA), each time with a seed and a length of its own near
               the reference's count, the same for both; some of the clips are kept, by chance
    repeat     a part of the last round once more, as it was: what is gained by having seen a request before
    load       in the scenario `loaded`, more and more callers at a time, until a side fails them (first pair only)
    evidence   what each optimization shows for having been active
    fidelity   each stage on the reference's own inputs, for a few texts; behind the evidence, which it would change
               (first pair only)

A side whose process has ended is asked no more; the other goes on.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product, zip_longest
from typing import Any

import numpy as np

from harness.comparison import pairs
from harness.devices import leased_core, share_of_cores, visible_gpus, waits_for_its_host
from harness.experiment import Experiment
from harness.load_pass import LoadPass
from harness.measure import CpuWatch
from harness.plugins import import_catalogue
from harness.quality.replay import Case
from harness.quality.stages import compare_stages
from harness.results import Measurement
from harness.sampling import given
from harness.scenarios import Call, Request, Turn
from harness.scenarios.loaded import Loaded
from harness.side import Side
from harness.stopping import is_answered
from harness.variant import Setup
from harness.workload import Item

HEARD_PAIRS = 12
"""Timed clips of each variant that are judged, where there are as many."""
REPEATED_TURNS = 3
"""Turns of the last round that are asked for once more."""
UNTRAINED = "the checkpoint's weights come from a seed, so it cannot speak"


class Pair:
    """Two processes taking turns. `number` says which pair of the experiment they are."""

    def __init__(self, experiment: Experiment, number: int) -> None:
        self.experiment, self.number = experiment, number
        self.settings, self.scenario = experiment.settings, experiment.scenario
        self.counts, self.draws = experiment.counts, experiment.draws
        self.sides = experiment.begin_pair()
        self.reference, self.candidate = self.sides.values()
        self.timed: list[Measurement] = []
        self.last_round: list[dict[str, tuple[Request, ...]]] = []

    def measure(self) -> bool:
        """All passes; False if a side could not load or did not live to the end."""
        if not self.load():
            return False
        self.plan()
        self.first_calls()
        if self.experiment.speaks and self.number == 0:
            self.quality_pass()
        watch = self.watch()
        for number in self.speed_rounds():
            self.note_conditions(number, watch)
            watch = self.watch()
        self.repeat_pass()
        if isinstance(self.scenario, Loaded) and self.number == 0:
            LoadPass(self.scenario, self.experiment, self.sides, self.draws, self.timed).measure()
        self.collect_evidence()
        if self.number == 0:
            self.compare_stages()
        return all(side.alive for side in self.sides.values())

    # -- before anything is spoken ------------------------------------------------------------------------------------

    def load(self) -> bool:
        """Load one side after the other; False if one is missing, for the other could not be paired."""
        described: tuple[dict[str, Any], list[str]] = {"name": self.experiment.device}, []
        for side in self.sides.values():
            self.experiment.report(f"loading {side.name}")
            with self.experiment.ledger.book("loading_s"):
                loaded = side.load(self.setup(side), self.settings["load_limit_s"])
            if loaded is None:
                break
            described = loaded if side is self.reference else described
            side.energy = self.reference.energy  # of the same GPU, whatever the other process says
        complete = all(side.alive and side.child.status == "ok" for side in self.sides.values())
        if not complete:
            for side in self.sides.values():
                if side.child.status == "ok":
                    side.child.fail("not measured: the other process could not load")
        device, voices = described
        if self.number == 0:
            self.experiment.describe(device)
        self.experiment.write_records()
        if self.number == 0 and complete:
            self.experiment.fit(voices, bool(self.reference.child.trained))
        return complete

    def setup(self, side: Side) -> Setup:
        """What a side's process is given."""
        config, modules = self.experiment.spec.config, self.experiment.spec.config["plugin_modules"]
        pipeline, catalogue = config["pipeline"], import_catalogue(modules)
        variables = visible_gpus()
        for plugin, params in side.toggles.items():
            variables |= catalogue.create(plugin, params).environment()
        return Setup(
            variant=side.name,
            folder=self.experiment.folder.path,
            loader=pipeline["loader"],
            loader_arguments={key: pipeline[key] for key in ("name", "checkpoint_dir", "seed")},
            device=self.experiment.device,
            sampling=given(pipeline),
            language=pipeline.get("language"),
            plugins=side.toggles,
            plugin_modules=tuple(modules),
            environment=variables,
            threads=pipeline["threads"] or share_of_cores(self.experiment.device),
        )

    @property
    def turns(self) -> list[Turn]:
        """The calls of a round."""
        return self.scenario.turns(self.experiment.shares)

    def plan(self) -> None:
        """Rows that each variant owes, of this pair and those after it."""
        own_warmup = self.scenario.own_warmup(self.experiment.shares)
        left = self.experiment.processes - self.number
        for name, items in self.experiment.shares.items():
            plan = self.experiment.plans[name]
            if self.number == 0:
                n_warmup = self.settings["warmup_calls"] * (1 + sum(len(turn[name]) for turn in own_warmup))
                plan.first, plan.warmup = left, left * n_warmup
                plan.repeat = left * sum(len(turn[name]) for turn in self.turns[:REPEATED_TURNS])
                plan.quality = len(items) * len(self.experiment.seeds) if self.experiment.speaks else 0
                plan.speed = left * len(items) * self.scenario.least_rounds(self.settings)
            if not self.experiment.speaks:
                self.sides[name].child.quality_unmeasured_reason = UNTRAINED
        self.experiment.write_plan()

    def plan_more_rounds(self, number: int) -> None:
        """A round beyond those that were planned."""
        if number >= self.scenario.least_rounds(self.settings):
            for name, items in self.experiment.shares.items():
                self.experiment.plans[name].speed += len(items)
            self.experiment.write_plan()

    # -- the passes ---------------------------------------------------------------------------------------------------

    def first_calls(self) -> None:
        """The first call and the warm-up calls: one text, the candidate held to what the reference said."""
        item = self.experiment.items[0]
        count = self.counts.get(item)
        request = self.draws.request(item, count)
        for position, side in enumerate(self.sides.values()):
            for row in self.speak(Call(side.name, "first", (request,), position=position)):
                count = count or row.n_tokens
                request = replace(request, n_tokens=count)
                if row.ok:
                    side.count_first_utterance(row)
        for number in range(self.settings["warmup_calls"]):
            request = self.draws.request(item, count)
            for position, side in enumerate(self.sides.values()):
                self.speak(Call(side.name, "warmup", (request,), number, position))

    def quality_pass(self) -> None:
        """Every text with every seed, each side stopping by itself. The first seed's counts say how long a text is."""
        for seed, turn in product(self.experiment.seeds, self.turns):
            for position, (name, items) in enumerate(turn.items()):
                requests = tuple(Request(item, seed) for item in items)
                call = Call(name, "quality", requests, position=position, kept=frozenset(items))
                for item, row in zip(items, self.speak(call), strict=False):
                    if row.n_tokens and (name == self.reference.name or item not in turn[self.reference.name]):
                        self.counts.setdefault(item, row.n_tokens)

    def speed_rounds(self) -> Iterator[int]:
        """Every text in every round, equal work for both, neighbours in time, the order flipping.

        Rounds are added while the budget lasts and the answer is open; the minimum is kept whatever it takes.
        """
        own_warmup = self.scenario.own_warmup(self.experiment.shares)
        for number, turn in product(range(self.settings["warmup_calls"]), own_warmup):
            self.take_turn(self.fresh(turn), "warmup", number, first=self.reference)
        for side in self.sides.values():
            side.time_the_pipe(self.scenario.method, self.settings["call_limit_s"])
            side.begin_steady_state()
        start, least = time.monotonic(), self.scenario.least_rounds(self.settings)
        budget_s = self.settings["budget_s"] / self.experiment.processes
        for number in range(max(least, self.settings["max_rounds"])):
            spent = time.monotonic() - start
            if number >= least and (spent * (number + 1) / number > budget_s or self.has_its_answer()):
                break
            self.plan_more_rounds(number)
            kept = self.chosen_to_be_heard(number, least)
            self.last_round = [self.fresh(turn) for turn in self.turns]
            for index, requests in enumerate(self.last_round):
                first = self.reference if (number + index) % 2 == 0 else self.candidate
                with self.on_one_core():
                    self.take_turn(requests, "speed", number, first, kept)
            yield number
        for side in self.sides.values():
            side.time_the_pipe(self.scenario.method, self.settings["call_limit_s"])

    def has_its_answer(self) -> bool:
        """Whether what the job should detect would have been found by now; never where it says nothing of that."""
        detectable = self.settings.get("detectable")
        if detectable is None:
            return False
        paired = pairs(self.timed, self.reference.name, self.candidate.name)
        return is_answered(paired, self.scenario.compared[0], self.settings["thresholds"]["rtf"], detectable)

    def repeat_pass(self) -> None:
        """A part of the last round once more, as it was: what a variant gains where it has seen a request before."""
        for index, requests in enumerate(self.last_round[:REPEATED_TURNS]):
            with self.on_one_core():
                self.take_turn(requests, "repeat", 0, first=self.reference if index % 2 == 0 else self.candidate)

    @contextmanager
    def on_one_core(self) -> Iterator[None]:
        """In here both sides launch their GPU's work from one core, each turn another: one whose neighbours are busy is
        slow for both."""
        cores: list[int] = self.reference.granted.get("cores") or []
        with leased_core(cores if waits_for_its_host(self.experiment.device) else []) as core:
            for side in self.sides.values():
                side.keep_to(cores if core is None else [core])
            yield
        for side in self.sides.values():
            side.keep_to(cores)

    def fresh(self, turn: Turn) -> dict[str, tuple[Request, ...]]:
        """What each side is asked in a turn: the same of what both speak; what has no known length is left out."""
        drawn = {
            item: self.draws.request(item, self.counts[item])
            for item in dict.fromkeys(item for items in turn.values() for item in items)
            if item in self.counts
        }
        return {name: tuple(drawn[item] for item in items if item in drawn) for name, items in turn.items()}

    def chosen_to_be_heard(self, number: int, least: int) -> frozenset[Item]:
        """The items whose clips of this round will be judged, on both sides alike: by chance, and nobody else's."""
        shares = self.experiment.shares.values()
        both = [item for item in self.experiment.items if all(item in share for share in shares)]
        n = math.ceil(HEARD_PAIRS / (least * self.experiment.processes)) if number < least else 1
        return frozenset(secrets.SystemRandom().sample(both, min(n, len(both))))

    def take_turn(
        self,
        requests: Mapping[str, tuple[Request, ...]],
        step: str,
        number: int,
        first: Side,
        kept: frozenset[Item] = frozenset(),
    ) -> None:
        """A call by each side, one right after the other."""
        for position, name in enumerate(sorted(requests, key=lambda name: name != first.name)):
            if requests[name]:
                self.speak(Call(name, step, requests[name], number, position, kept))

    def collect_evidence(self) -> None:
        """Ask the optimizations for what they have to show."""
        with self.experiment.ledger.book("evidence_s"):
            for side in self.sides.values():
                side.collect_evidence(self.settings["call_limit_s"])

    def compare_stages(self) -> None:
        """Give each stage of both sides the reference's own inputs, and write down how far apart they are."""
        n_texts = self.experiment.spec.config["quality"].get("fidelity_texts", 0)
        if not n_texts or not all(side.alive for side in self.sides.values()):
            return
        self.experiment.report("comparing stages")
        items, seed, folder = self.experiment.items[:n_texts], self.experiment.seeds[0], self.experiment.folder
        cases = [Case(item.text_id, item.text, item.voice, self.counts.get(item), item.language) for item in items]
        limit_s = self.settings["call_limit_s"] * (1 + len(cases))
        with self.experiment.ledger.book("scoring_s"):
            found = compare_stages(folder.path, self.reference, self.candidate, cases, seed, limit_s)
        folder.write_json("fidelity.json", found)

    # -- one call -----------------------------------------------------------------------------------------------------

    def speak(self, call: Call) -> list[Measurement]:
        """Have a call answered, hear what came of it, and write its rows; none once the side's process has ended."""
        side = self.sides[call.variant]
        if not side.alive:
            return []
        self.look_for_hindrance()
        self.experiment.report(f"{call.step} {'pass' if call.step in ('speed', 'quality') else 'call'}, {call.variant}")
        orders = [request.order for request in call.requests]
        started_s = self.experiment.ledger.elapsed_s
        heard = side.speak(self.scenario.method, orders, self.settings["call_limit_s"] * len(orders))
        self.experiment.ledger.measured_s += heard.parent_s
        self.look_for_hindrance()
        rows = self.scenario.rows(call, heard)
        for request, row, wave, said in zip_longest(call.requests, rows, heard.waves, heard.said):
            row.process, row.started_s = self.number, started_s
            if row.ok:
                self.listen(row, request, wave, said.sample_rate, keep=request.item in call.kept)
        self.experiment.add(rows)
        self.timed += [row for row in rows if row.pass_name == "speed"]
        return rows

    def look_for_hindrance(self) -> None:
        """Nobody may hinder the other process; who would is the candidate."""
        hindered = next((words for side in self.sides.values() if (words := side.hindrance())), None)
        if hindered and self.candidate.child.status == "ok":
            self.candidate.child.fail(hindered)

    def listen(self, row: Measurement, request: Request, wave: np.ndarray, sample_rate: int, keep: bool) -> None:
        """Add to a row what is heard in its wave, and keep the clip if it was chosen."""
        known = self.experiment.sample_rate = self.experiment.sample_rate or sample_rate
        if sample_rate != known:
            row.flaw = f"its sample rate is {sample_rate}, and {known} before"
        for name, value in (
            self.sides[row.variant].listener.columns(request.item, (row.pass_name, request), wave, sample_rate).items()
        ):
            setattr(row, name, value)
        if keep:
            row.audio, row.audio_sha = self.experiment.folder.add_clip(row, wave, sample_rate)

    def watch(self) -> CpuWatch:
        return CpuWatch([side.pid for side in self.sides.values()])

    def note_conditions(self, number: int, watch: CpuWatch) -> None:
        """Clocks and the like of a round that is over, as the first process that is alive sees them, and the load."""
        alive = next((side for side in self.sides.values() if side.alive), None)
        state = (alive.ask("state", limit_s=self.settings["call_limit_s"]) or {}) if alive else {}
        load = {"foreign_share": watch.foreign_share()} if self.experiment.device == "cpu" else {}
        self.experiment.conditions.append({"process": self.number, "round": number, **state, **load})
