"""The comparison of stages in a job: the reference records, both sides replay, the parent compares.

What goes between the processes lies in the run's folder meanwhile; what stays is fidelity.json:

    {"cases": [{"text_id": ..., "voice": ..., "n_tokens": ...}, ...],
     "stages": {"generate_tokens": {"verdict": "faithful", "figures": {"kl_mean": {"mean", "low", "high"}, ...}}, ...}}

or, where a side could not do it, {"reason": ...}.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from harness.quality.fidelity import Trace, compare, summarize

WORKPLACE = "fidelity"
"""A folder of the run's own, gone when the comparison is done."""


class Asked(Protocol):
    """One side of a job: `harness.side.Side`."""

    name: str
    last_error: str | None

    def ask(self, method: str, *arguments: Any, limit_s: float) -> Any:
        """The answer of its process; None if it failed."""
        ...


def compare_stages(
    folder: Path, reference: Asked, candidate: Asked, cases: Sequence[Any], seed: int, limit_s: float
) -> dict[str, Any]:
    """What goes into fidelity.json. `cases` are `harness.quality.replay.Case`; `limit_s` is for each side's part."""
    work = folder / WORKPLACE
    inputs, traces = (
        work / "inputs.npz",
        {side.name: work / f"{i}.npz" for i, side in enumerate((reference, candidate))},
    )
    try:
        if not reference.ask("record_stages", cases, seed, inputs, limit_s=limit_s):
            return {"reason": f"{reference.name}: {_last_line(reference.last_error)}"}
        for side in (reference, candidate):
            if not side.ask("replay_stages", cases, seed, inputs, traces[side.name], limit_s=limit_s):
                return {"reason": f"{side.name}: {_last_line(side.last_error)}"}
        return {"cases": [asdict(case) for case in cases], "stages": _compare(cases, *traces.values())}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compare(cases: Sequence[Any], reference: Path, candidate: Path) -> dict[str, Any]:
    from harness.quality.replay import load  # imports torch

    pairs = zip(load(reference, Trace), load(candidate, Trace), strict=True)
    return summarize([compare(*pair) for pair in pairs], [case.text_id for case in cases])


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1].strip() if lines else "its process had ended"
