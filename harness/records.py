"""What an experiment knows of its two sides while it runs, and leaves in children.json and plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass
class Child:
    """One variant's process: an entry of children.json. Times in seconds, memory in MB.

    `process_to_first_utterance_s` is as if the process had imported the packages for itself. What was not found out,
    because loading failed or never began, is None.
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

    def fail(self, error: str) -> None:
        self.status, self.error = "failed", error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What an older harness noted besides is left out."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})


@dataclass
class Plan:
    """Rows that one variant owes in each pass: an entry of plan.json."""

    first: int = 0
    warmup: int = 0
    speed: int = 0
    quality: int = 0

    @property
    def total(self) -> int:
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
