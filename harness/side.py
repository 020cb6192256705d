"""One of an experiment's two sides, as the parent sees it: its optimizations, its process, what is known of it."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psutil
import torch

from harness import measure
from harness.answers import SEALED_EVERY, Account, Answer, Order, seal
from harness.config import Toggles
from harness.hearing import Listener
from harness.load import Closed, Open, drive
from harness.records import Child
from harness.results import Measurement
from harness.scenarios.base import Heard, Visit
from harness.scenarios.streaming import IN_PIECES
from harness.worker import ChildError, Setup, Worker

PINGS = 9
"""Empty calls that tell how long a question and its answer take on their way."""
SPIN_S = 0.005
"""Threads of a pool look out for more work before they sleep (GNU's OpenMP: 2 to 3 ms), all of them at once."""
BROKEN = "it answered with what no worker says"


class Side:
    """A variant in one process. `statuses` holds what became of its optimizations, as far as that is known.

    Whatever the process says of a call is a claim. The time is taken here; memory on a CPU and CPU time are read from
    the kernel; waves have to be those that were there when the clock stopped.
    """

    def __init__(self, name: str, toggles: Toggles, device: str, listener: Listener) -> None:
        self.name, self.toggles, self.device = name, toggles, torch.device(device)
        self.child = Child()
        self.listener = listener
        self.energy = measure.EnergyMeter(None)
        self.statuses: dict[str, dict[str, Any]] = {}
        self.worker: Worker | None = None
        self.last_error: str | None = None
        self.granted: dict[str, Any] = {}
        self._idle_since: float | None = None

    @property
    def alive(self) -> bool:
        return self.worker is not None and self.worker.alive

    @property
    def pid(self) -> int:
        return self.worker.pid if self.worker else 0

    # -- before and after the calls -----------------------------------------------------------------------------------

    def load(self, setup: Setup, limit_s: float) -> tuple[dict[str, Any], list[str]] | None:
        """Start the process and load the pipeline: the device and the voices, as the process describes them.

        None if it failed, which the child's record says.
        """
        self.worker = Worker(setup)
        self.meter = measure.CpuMeter(self.pid)
        loaded = self.ask("load", limit_s=limit_s)
        if loaded is None:
            return None
        self.statuses = loaded["optimizations"]
        self.energy = measure.EnergyMeter(loaded["gpu"])
        self.child.update(loaded)
        self.child.load_s = max(self.child.load_s or 0.0, self.worker.answered_in_s)
        self.child.process_to_first_utterance_s = (self.child.imports_s or 0.0) + self.child.load_s
        self.granted = self.scheduling()
        return loaded["device"], loaded["voices"]

    def count_first_utterance(self, row: Measurement) -> None:
        """Add the first call to the time that the process has needed so far."""
        self.child.process_to_first_utterance_s = (self.child.process_to_first_utterance_s or 0.0) + (row.time_s or 0.0)

    def time_the_pipe(self, method: str, limit_s: float) -> None:
        """Note how long empty calls take: a question and its answer on their way."""
        taken = []
        for _ in range(PINGS):
            if self.alive and self.ask(method, [], 0, limit_s=limit_s) is not None and self.worker:
                taken.append(self.worker.answered_in_s)
        if taken:
            self.child.round_trips_s.append(statistics.median(taken))

    def begin_steady_state(self) -> None:
        """From here on, CPU time is booked, in calls and between them."""
        self.meter.refresh()
        self.child.cpu_in_calls_s = self.child.cpu_between_calls_s = 0.0
        self._idle_since = None

    def collect_evidence(self, limit_s: float) -> None:
        """Ask the optimizations for what they have to show."""
        if self.alive and self.toggles:
            self.statuses = self.ask("evidence", limit_s=limit_s) or self.statuses

    def statuses_of(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The status of every optimization named, also of those that are off or whose process failed."""
        lost = {
            "enabled": True,
            "status": "failed",
            "reason": "its process failed while loading",
            "evidence": {},
        }
        off = {"enabled": False, "status": "off", "reason": None, "evidence": {}}
        return {name: self.statuses.get(name, lost if name in self.toggles else off) for name in names}

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.stop()

    def scheduling(self) -> dict[str, Any]:
        """The priority and the cores that the system gives the process; empty where it does not tell."""
        try:
            process = psutil.Process(self.pid)
            cores = sorted(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None
            return {"priority": process.nice(), "cores": cores}
        except psutil.Error:
            return {}

    def keep_to(self, cores: list[int]) -> None:
        """Have the main thread compute on these cores, if the system tells of any; its helpers stay where they are."""
        if self.alive and self.granted.get("cores") not in (None, cores):
            try:
                psutil.Process(self.pid).cpu_affinity(cores)
            except psutil.Error:
                return
            self.granted["cores"] = cores

    def hindrance(self) -> str | None:
        """Whether somebody else has changed the process's priority or cores since it was loaded."""
        now = self.scheduling() if self.alive else {}
        if not now or not self.granted or now == self.granted:
            return None
        was, is_ = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (self.granted, now))
        return f"the process of {self.name} was hindered while the job went on: it had {was}, and then {is_}."

    # -- a call -------------------------------------------------------------------------------------------------------

    def speak(self, method: str, orders: Sequence[Order], limit_s: float) -> Heard:
        """Have the orders spoken in one call: what the process claims, and what was found from outside."""
        offset = secrets.randbelow(SEALED_EVERY)
        self.ask("prepare", limit_s=limit_s)
        if self.device.type == "cpu":
            measure.reset_peak(self.device, self.pid)
        start_s, before_j = self._book_idle_time(), self.energy.total_j()
        claim = self.ask(method, list(orders), offset, limit_s=limit_s)
        after_j = self.energy.total_j()
        heard = Heard(parent_s=self.worker.answered_in_s if self.worker and claim else limit_s)
        heard.chunks = self.worker.chunks if self.worker else []
        heard.energy_j = after_j - before_j if after_j is not None and before_j is not None else None
        if claim is None:
            heard.error = self.last_error
            return heard
        answered_s = self.meter.total_s()
        time.sleep(SPIN_S)
        helpers_s = self.meter.helpers_s()
        try:
            answer = Answer.of(claim)
            heard.error, heard.seconds, heard.said = answer.error, answer.seconds, answer.utterances
            if len(orders) != len(answer.utterances) and not answer.error:
                raise ValueError(f"{len(answer.utterances)} utterances, and {len(orders)} were asked for")
            self._take_account(heard, offset, limit_s)
        except (KeyError, TypeError, ValueError, AttributeError, ChildError) as error:
            heard.error = f"{BROKEN}: {error}" if not isinstance(error, ChildError) else str(error)
        self._book(start_s, answered_s, helpers_s)
        return heard

    def serve(
        self, load: Closed | Open, orders: Sequence[Order], sample_rate: int, limit_s: float, call_limit_s: float
    ) -> list[Visit | None]:
        """Have the orders come as a load has them, for at most `limit_s`: what came of each, None if it never came.

        `last_error` says why, where the process stopped serving; what was heard by then is lost with it.
        """
        offset = secrets.randbelow(SEALED_EVERY)
        self.ask("prepare", limit_s=call_limit_s)
        start_s = self._book_idle_time()
        if self.worker is None or not self.alive:
            return [None] * len(orders)
        try:
            talk = self.worker.serve(offset, sample_rate=sample_rate, limit_s=limit_s + call_limit_s)
            served = drive(talk, load, orders, limit_s=limit_s)
            answer = Answer.of(talk.end(call_limit_s))
        except (ChildError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.last_error = str(error) if isinstance(error, ChildError) else f"{BROKEN}: {error}"
            if not self.alive:
                self.child.fail(self.last_error)
            return [None] * len(orders)
        self._book(start_s, self.meter.total_s(), self.meter.helpers_s())
        waves = [np.frombuffer(b"".join(talk.parts[caller]), dtype=np.float32) for caller in range(len(served))]
        whole = [caller for caller, one in enumerate(served) if one.is_whole]
        said = dict(zip(whole, answer.utterances, strict=False))
        visits: list[Visit | None] = [None] * len(orders)
        for caller, (one, wave) in enumerate(zip(served, waves, strict=True)):
            chunks = [[arrival.ready_s, arrival.audio_s] for arrival in one.arrivals]
            visit = visits[caller] = Visit(one.came_s, chunks, wave, len(wave) / sample_rate, one.is_whole)
            if caller in said:
                visit.n_tokens = said[caller].n_tokens
                visit.flaw = None if seal(wave, offset) == said[caller].seal else IN_PIECES
            elif one.is_whole:
                visit.flaw = BROKEN
        return visits

    def _take_account(self, heard: Heard, offset: int, limit_s: float) -> None:
        """Memory, counts and waves of the call that was just answered."""
        claim = self.ask("account", limit_s=limit_s)
        if claim is None:
            heard.error = heard.error or self.last_error
            return
        account = Account.of(claim)
        assert self.worker is not None
        blocks = self.worker.receive(account.n_waves, limit_s)
        heard.waves = [np.frombuffer(block, dtype=np.float32) for block in blocks]
        heard.counts = measure.holdings(self.pid) | account.counts
        if account.memory is not None:
            heard.memory_kind, heard.peak_memory_mb = str(account.memory["kind"]), float(account.memory["peak_mb"])
            heard.memory = {str(name): float(value) for name, value in account.memory["detail"].items()}
        else:
            try:
                peak = measure.peak(self.device, self.pid)
            except psutil.Error:
                return
            heard.memory_kind, heard.peak_memory_mb, heard.memory = peak.kind, peak.peak_mb, peak.detail
        if not heard.error:
            if len(heard.waves) != len(heard.said):
                raise ValueError(f"{len(heard.waves)} waves of {len(heard.said)} utterances")
            heard.unsealed = [
                seal(wave, offset) != said.seal for wave, said in zip(heard.waves, heard.said, strict=True)
            ]

    # -- CPU time, by the kernel's account ----------------------------------------------------------------------------

    def _book_idle_time(self) -> float | None:
        """What the process has used since its last call was accounted for, when it had nothing to do."""
        now_s = self.meter.total_s()
        if now_s is not None and self._idle_since is not None:
            self.child.cpu_between_calls_s += now_s - self._idle_since
        return now_s

    def _book(self, start_s: float | None, answered_s: float | None, helpers_s: float | None) -> None:
        """What it used in the call, and what its helpers used while the call was accounted for.

        What they use in the first SPIN_S is nobody's: work could not hide there for longer than that.
        """
        self._idle_since = self.meter.total_s()
        helpers_now_s = self.meter.helpers_s()
        if start_s is not None and answered_s is not None:
            self.child.cpu_in_calls_s += answered_s - start_s
        if helpers_s is not None and helpers_now_s is not None:
            self.child.cpu_between_calls_s += max(0.0, helpers_now_s - helpers_s)

    # -- the pipe -----------------------------------------------------------------------------------------------------

    def ask(self, method: str, *arguments: Any, limit_s: float) -> Any:
        """The child's answer; None if it failed. Its record says so where that was the end of the variant."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(method, *arguments, limit_s=limit_s)
        except ChildError as error:
            if method == "load" or not self.alive:
                self.child.fail(str(error))
            self.last_error = str(error)
            return None
