"""One of an experiment's two sides, as the parent sees it: its optimizations, its process, what is known of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.config import Toggles
from harness.records import Child, Plan
from harness.results import Measurement
from harness.worker import ChildError, Setup, Worker


class Side:
    """A variant on its way. `statuses` holds what became of each of its optimizations, as far as that is known."""

    def __init__(self, name: str, toggles: Toggles) -> None:
        self.name, self.toggles = name, toggles
        self.child, self.plan = Child(), Plan()
        self.statuses: dict[str, dict[str, Any]] = {}
        self.worker: Worker | None = None
        self.last_error: str | None = None

    @property
    def alive(self) -> bool:
        return self.worker is not None and self.worker.alive

    @property
    def pid(self) -> int:
        return self.worker.pid if self.worker else 0

    def load(self, setup: Setup, limit_s: float) -> tuple[dict[str, Any], list[str]] | None:
        """Start the process and load the pipeline: the device and the voices, as the process describes them.

        None if it failed, which the child's record says.
        """
        self.worker = Worker(setup)
        loaded = self.ask("load", limit_s=limit_s)
        if loaded is None:
            return None
        device, voices, self.statuses = loaded.pop("device"), loaded.pop("voices"), loaded.pop("optimizations")
        self.child = Child(**loaded, process_to_first_utterance_s=loaded["imports_s"] + loaded["load_s"])
        return device, voices

    def count_first_utterance(self, row: Measurement) -> None:
        """Add the first call to the time that the process has needed so far."""
        self.child.process_to_first_utterance_s = (self.child.process_to_first_utterance_s or 0.0) + (
            row.generation_time_s or 0.0
        )

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

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.stop()
