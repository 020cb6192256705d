"""Optimizations on a pipeline: what can run here is applied, and each is accounted for.

A status is a record {"enabled": True, "status": ..., "reason": ..., "evidence": {...}}, where the status is

    unavailable   it cannot run here; the reason says why
    failed        it raised; the reason is its traceback
    inactive      it was applied and shows no evidence of having done anything (or was not asked yet), or it changed
                  nothing, or nothing that lasted, whatever its evidence says
    active        its evidence shows it, and what it changed still stands
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError
from harness.locations import trace
from harness.results import NO_EVIDENCE

Status = dict[str, Any]
UNCHANGED = "it changed nothing in the pipeline"


@dataclass
class Fitted:
    """A pipeline, the optimizations that were applied to it, and the status of every one that was asked for."""

    pipeline: Any
    plugins: dict[str, Any] = field(default_factory=dict)
    statuses: dict[str, Status] = field(default_factory=dict)
    inherited: Mapping[str, str] = field(default_factory=dict)
    """The environment's variables as they would have been without the optimizations, where that is known."""

    def evidence(self) -> dict[str, Status]:
        """After a synthesis: the statuses, with what each optimization shows for having been active, and changed."""
        standing = self.pipeline.standing()
        for name, plugin in self.plugins.items():
            changes = standing.get(name, []) + self._variables(plugin)
            try:
                shown = plugin.evidence(self.pipeline)
            except Exception:
                self.statuses[name] = _status("failed", f"its evidence raised:\n{trace()}")
                continue
            reason = shown.reason if shown.active else shown.reason or "it shows no evidence of having been active"
            if shown.active and not changes:
                made = ", ".join(self.pipeline.changes(name))
                reason = f"what it changed was put back or replaced: {made}" if made else UNCHANGED
            status = "active" if shown.active and changes else "inactive"
            self.statuses[name] = _status(status, reason, {"changes": changes} | shown.facts | {"changes": changes})
        return self.statuses

    def _variables(self, plugin: Any) -> list[str]:
        """The environment's variables that an optimization had set for this process, and that are still so."""
        wanted = plugin.environment().items()
        return [f"${name}" for name, value in wanted if os.environ.get(name) == value != self.inherited.get(name)]


def fit(
    load: Callable[[], Any],
    toggles: Mapping[str, dict[str, Any]],
    create: Callable[[str, dict[str, Any]], Any],
    inherited: Mapping[str, str] | None = None,
) -> Fitted:
    """`load()` with every optimization of `toggles`, names to parameters, that can run here; `create` makes one.

    One that raises half-way leaves a pipeline in an unknown state, so loading starts again without it. UserError goes
    through: what a person asked for wrongly is no failure of an optimization.
    """
    failed: dict[str, Status] = {}
    while True:
        fitted = Fitted(load(), inherited=inherited or {})
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
        with fitted.pipeline.changing(plugin.name, home=type(plugin).__module__):
            plugin.apply(fitted.pipeline)
    except UserError:
        raise
    except Exception:
        return _status("failed", trace())
    fitted.plugins[plugin.name] = plugin
    return _status("inactive", NO_EVIDENCE)


def _unset(variables: dict[str, str]) -> str | None:
    """Why a process that was started without these variables is too late for an optimization that needs them."""
    missing = [f"{name}={value}" for name, value in variables.items() if os.environ.get(name) != value]
    return f"this process was started without {' '.join(missing)}: set it before Python starts" if missing else None


def _status(status: str, reason: str | None, evidence: dict[str, Any] | None = None) -> Status:
    return {"enabled": True, "status": status, "reason": reason, "evidence": evidence or {}}
