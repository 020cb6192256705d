"""What an experiment knows of its two sides while it runs, and leaves in children.json and plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass
class Child:
    """One variant's process: an entry of children.json. Times in seconds, memory in MB.

    `process_to_first_utterance_s` is as if the process had imported the packages for itself. `round_trips_s` holds how
    long an empty call took on its way, before the speed pass and after it; `cpu_in_calls_s` and `cpu_between_calls_s`
    are CPU time of the speed pass. What was not found out, because loading failed or never began, is None.
    """

    status: str = "ok"
    error: str | None = None
    imports_s: float | None = None
    load_s: float | None = None
    model_memory_mb: float | None = None
    memory_kind: str | None = None
    trained: bool | None = None
    process_to_first_utterance_s: float | None = None
    quality_unmeasured_reason: str | None = None
    round_trips_s: list[float] = field(default_factory=list)
    cpu_in_calls_s: float = 0.0
    cpu_between_calls_s: float = 0.0

    def fail(self, error: str) -> None:
        self.status, self.error = "failed", error

    def update(self, record: Mapping[str, Any]) -> None:
        """Take over what the record knows; what it names besides is left out, and what is null stays as it was."""
        for one in fields(self):
            if record.get(one.name) is not None:
                setattr(self, one.name, record[one.name])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        child = cls()
        child.update(record)
        return child


@dataclass
class Plan:
    """Rows that one variant owes in each pass: an entry of plan.json."""

    first: int = 0
    warmup: int = 0
    speed: int = 0
    quality: int = 0
    repeat: int = 0
    load: int = 0

    @property
    def total(self) -> int:
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
