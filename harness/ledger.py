"""Where a job's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Where a job's time goes: loading, measured calls, evidence (probes in the child), scoring.

    All the rest is orchestration: talking to the children, writing files, waiting, summing up.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = started if started is not None else time.monotonic()
        self.loading_s = time.monotonic() - self.started  # the packages, which the forkserver imports meanwhile
        self.measured_s = 0.0
        self.evidence_s = 0.0
        self.scoring_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def book(self, account: str) -> Iterator[None]:
        """Add the time spent inside to one of the accounts."""
        start = time.monotonic()
        try:
            yield
        finally:
            setattr(self, account, getattr(self, account) + time.monotonic() - start)

    def read(self) -> dict[str, float]:
        job_s = self.elapsed_s
        booked_s = self.loading_s + self.measured_s + self.evidence_s + self.scoring_s
        orchestration_s = max(0.0, job_s - booked_s)
        return {
            "job_s": job_s,
            "loading_s": self.loading_s,
            "measured_s": self.measured_s,
            "evidence_s": self.evidence_s,
            "scoring_s": self.scoring_s,
            "orchestration_s": orchestration_s,
            "orchestration_share": orchestration_s / job_s,
        }
