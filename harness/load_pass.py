"""The load pass: more and more callers at a time, until a variant fails them. See `harness.scenarios.loaded`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

from harness.draws import Draws
from harness.experiment import Experiment
from harness.load import level
from harness.player import heard_of
from harness.results import Measurement
from harness.scenarios import Call, Request
from harness.scenarios.base import Visit
from harness.scenarios.loaded import CLOSED, OPEN, Loaded, Size
from harness.side import Side
from harness.workload import Item

HEARD_CLIPS = 4
"""Clips of each load that are judged, chosen by chance among those that were answered."""


class LoadPass:
    """Both sides, one after the other, at every size, in the one way and in the other."""

    def __init__(
        self,
        scenario: Loaded,
        experiment: Experiment,
        sides: Mapping[str, Side],
        draws: Draws,
        timed: Sequence[Measurement],
    ) -> None:
        """`timed` are rows of the speed pass, which tell how long a token plays."""
        self.scenario, self.experiment, self.sides, self.draws = scenario, experiment, sides, draws
        self.settings = experiment.settings
        spoken = [row for row in timed if row.ok and row.n_tokens and row.audio_s]
        n_tokens = sum(row.n_tokens or 0 for row in spoken)
        self.token_s = sum(row.audio_s or 0.0 for row in spoken) / n_tokens if n_tokens else None

    def measure(self) -> None:
        """Nothing where no utterance of the speed pass succeeded."""
        if self.token_s is None or self.experiment.sample_rate is None:
            return
        for how in (CLOSED, OPEN):
            standing = list(self.sides.values())
            for number, size in enumerate(self.scenario.sizes(how, self.settings)):
                requests, seed = self.requests(size.users), self.draws.number()
                for side in standing if number % 2 == 0 else standing[::-1]:
                    if not self.keeps(side, size, requests, seed, self.token_s, self.experiment.sample_rate):
                        standing = [one for one in standing if one is not side]

    def requests(self, users: int) -> tuple[Request, ...]:
        """The workload's items in turn, each with a seed and a length that it has not had."""
        known: list[Item] = [item for item in self.experiment.items if item in self.experiment.counts]
        n = users * self.settings["requests_per_user"]
        return tuple(self.draws.request(item, self.experiment.counts[item]) for item in islice(cycle(known), n))

    def keeps(
        self, side: Side, size: Size, requests: tuple[Request, ...], seed: int, token_s: float, sample_rate: int
    ) -> bool:
        """Ask a side for all of them, and write down what came; whether it was good enough."""
        if not side.alive or not requests:
            return False
        self.experiment.plans[side.name].load += len(requests)
        self.experiment.write_plan()
        self.experiment.report(f"load pass, {size.users} at a time, {side.name}")
        orders = [request.order for request in requests]
        load, started_s = size.load(requests, token_s, seed), self.experiment.ledger.elapsed_s
        visits = side.serve(load, orders, sample_rate, self.settings["users_limit_s"], self.settings["call_limit_s"])
        self.experiment.ledger.measured_s += self.experiment.ledger.elapsed_s - started_s
        rows = self.scenario.visit_rows(Call(side.name, "load", requests), size, visits, token_s)
        self.keep_some(rows, visits, sample_rate)
        for row in rows:
            row.started_s = started_s
        self.experiment.add(rows)
        return level(size.users, [heard_of(row) for row in rows]).keeps(self.settings["first_audio_limit_s"])

    def keep_some(self, rows: Sequence[Measurement], visits: Sequence[Visit | None], sample_rate: int) -> None:
        """Keep some of the answered ones' clips, to be judged."""
        whole = [(row, visit) for row, visit in zip(rows, visits, strict=True) if row.ok and visit]
        chosen = secrets.SystemRandom().sample(whole, min(HEARD_CLIPS, len(whole))) if self.experiment.speaks else []
        for row, visit in chosen:
            row.audio, row.audio_sha = self.experiment.folder.add_clip(row, visit.wave, sample_rate)
