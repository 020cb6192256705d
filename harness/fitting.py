"""Optimizations on a pipeline: what can run here is applied, and each is accounted for.

A status is a record {"enabled": True, "status": ..., "reason": ..., "evidence": {...}}, where the status is

    unavailable   it cannot run here; the reason says why
    failed        it raised; the reason is its traceback
    inactive      it was applied and shows no evidence of having done anything (or was not asked yet)
    active        its evidence shows it
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError
from harness.results import NO_EVIDENCE

Status = dict[str, Any]


@dataclass
class Fitted:
    """A pipeline, the optimizations that were applied to it, and the status of every one that was asked for."""

    pipeline: Any
    plugins: dict[str, Any] = field(default_factory=dict)
    statuses: dict[str, Status] = field(default_factory=dict)

    def evidence(self) -> dict[str, Status]:
        """After a synthesis: the statuses, with what each optimization shows for having been active."""
        for name, plugin in self.plugins.items():
            try:
                shown = plugin.evidence(self.pipeline)
            except Exception:
                self.statuses[name] = _status("failed", f"its evidence raised:\n{traceback.format_exc()}")
                continue
            reason = shown.reason if shown.active else shown.reason or "it shows no evidence of having been active"
            self.statuses[name] = _status("active" if shown.active else "inactive", reason, shown.facts)
        return self.statuses


def fit(
    load: Callable[[], Any], toggles: Mapping[str, dict[str, Any]], create: Callable[[str, dict[str, Any]], Any]
) -> Fitted:
    """`load()` with every optimization of `toggles`, names to parameters, that can run here; `create` makes one.

    One that raises half-way leaves a pipeline in an unknown state, so loading starts again without it. UserError goes
    through: what a person asked for wrongly is no failure of an optimization.
    """
    failed: dict[str, Status] = {}
    while True:
        fitted = Fitted(load())
        for name, parameters in toggles.items():
            status = failed.get(name) or _apply(create(name, parameters), fitted)
            fitted.statuses[name] = status
            if status["status"] == "failed" and name not in failed:
                failed[name] = status
                break
        else:
            return fitted


def _apply(plugin: Any, fitted: Fitted) -> Status:
    try:
        if reason := plugin.unavailable(fitted.pipeline) or _unset(plugin.environment()):
            return _status("unavailable", reason)
        plugin.apply(fitted.pipeline)
    except UserError:
        raise
    except Exception:
        return _status("failed", traceback.format_exc())
    fitted.plugins[plugin.name] = plugin
    return _status("inactive", NO_EVIDENCE)


def _unset(variables: dict[str, str]) -> str | None:
    """Why a process that was started without these variables is too late for an optimization that needs them."""
    missing = [f"{name}={value}" for name, value in variables.items() if os.environ.get(name) != value]
    return f"this process was started without {' '.join(missing)}: set it before Python starts" if missing else None


def _status(status: str, reason: str | None, evidence: dict[str, Any] | None = None) -> Status:
    return {"enabled": True, "status": status, "reason": reason, "evidence": evidence or {}}
