"""One run held against its rules: what passed, what got worse, what nobody can tell.

**Intervals decide.** A limit has passed if the whole 95 % interval lies within it and was broken if the whole interval
lies beyond it; anything between is undecided. A point estimate never decides: one just within the limit is as likely a
little too slow as a little too fast.

**Against a reference** the run's change against its own baseline is held against the reference's change against its
own: ratios travel between machines, times do not. Their uncertainties add up, so a reference is worth measuring well.

**Evidence is no limit.** Whatever the limits say, an optimization that should be active and is not, a watermark that
is lost, clips that only the combo leaves broken, and a combo that failed by what it did while it was timed are
regressions.

**What is not there does not pass.** A limit whose figure was not measured, a run that failed, is incomplete or was
edited: nobody knows, and that is not "passed".
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import stats
from harness.ablation import interval
from harness.errors import UserError
from harness.gate.limits import EVERY_SIMILARITY, WATERMARK, Limit, Rules
from harness.results import Comparison, RunFolder, Score, Summary

PASSED, REGRESSION, UNDECIDED, NOT_MEASURED = "passed", "regression", "undecided", "not measured"
EVIDENCE, CLIPS, RUN = "evidence", "clips", "run"
"""Subjects of findings that no limit is about."""

WITHDRAWN = "withdrawn"
EXPERIMENT = ("combo", "against", "pipeline", "workload", "scenario")
"""What two runs share if their ratios mean the same."""

MARKED = 0.5
"""The detector's confidence from which a clip counts as marked: its own rounding."""


@dataclass(frozen=True)
class Measured:
    """What the gate reads of a run, or of a run and its repetitions."""

    summary: Summary
    scores: Sequence[Score] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def device_kind(self) -> str:
        """cpu or cuda; of a run without its environment, by the kind of memory that it measured."""
        device = self.environment.get("device")
        if isinstance(device, dict) and device.get("type"):
            return str(device["type"])
        return "cuda" if self.memory_kind == "vram" else "cpu"

    @property
    def memory_kind(self) -> str:
        return next(iter(self.summary.variants.values())).memory_kind

    def combo_scores(self, other: bool = False) -> list[Score]:
        """The candidate's scores, or those of what it is compared with."""
        return [score for score in self.scores if (score.variant == self.summary.candidate) != other]


@dataclass(frozen=True)
class Finding:
    """One demand held against one run. `outcome` is PASSED, REGRESSION, UNDECIDED or NOT_MEASURED.

    `change` is what was found, on the metric's scale, and `bound` the value that the limit allows; None for demands
    that are no figures. `reason` says what an outcome rests on where the figures do not.
    """

    run_id: str
    subject: str
    limit: str
    outcome: str
    kind: str | None = None
    change: stats.Interval | None = None
    bound: float | None = None
    reason: str | None = None


def read(folder: RunFolder) -> Measured:
    """Raises UserError for a run without a summary, or with one that cannot be read."""
    return Measured(folder.summary(), folder.scores()[0], folder.read_json("environment.json"), folder.job())


def check(run: Measured, rules: Rules, reference: Measured | None = None) -> list[Finding]:
    """Every demand held against one run. Raises UserError for a reference that the run cannot be held against."""
    if reference is not None:
        require_comparable(run.summary, reference.summary)
    findings = [*_status(run), *_evidence(run, rules, reference), *_broken_clips(run), *_withdrawn(run)]
    limits = rules.limits if reference is None or same_device(run, reference) else rules.away()
    for limit in _applicable(limits, run):
        findings += _watermark(run, limit) if limit.metric == WATERMARK else _figures(run, limit, reference)
    if not any(limit.metric == WATERMARK for limit in limits):
        findings += [finding for finding in _watermark(run, None) if finding.outcome == REGRESSION]
    return findings


def require_comparable(run: Summary, reference: Summary) -> None:
    """Raises UserError for a reference of another experiment, or one that is itself in doubt."""
    for what in EXPERIMENT:
        ours, theirs = getattr(run, what), getattr(reference, what)
        if ours != theirs:
            raise UserError(
                f"reference {reference.run_id} measured {what} {theirs!r} and {run.run_id} {ours!r}: "
                "their ratios mean different things; name a reference of the same experiment"
            )
    if reference.status != "ok":
        why = reference.warnings[0] if reference.warnings else "its warnings say why"
        raise UserError(f"reference {reference.run_id} is {reference.status}, so nothing can be held against it: {why}")


# ------------------------------------------------------------------------------------------ devices


def fingerprint(environment: dict[str, Any]) -> tuple[Any, ...]:
    """What two devices share if absolute figures may be compared between them: hardware, not software."""
    device = environment.get("device") or {}
    if not isinstance(device, dict):
        return (str(device),)
    if device.get("type") == "cuda":
        return "cuda", device.get("name"), device.get("memory_mb")
    cpu = environment.get("cpu") or {}
    return "cpu", cpu.get("model") or device.get("name"), cpu.get("cores"), tuple(cpu.get("features") or ())


def same_device(run: Measured, other: Measured) -> bool:
    """Two runs that do not say where they were measured are of different devices."""
    return bool(run.environment) and fingerprint(run.environment) == fingerprint(other.environment)


# ----------------------------------------------------------------------------------- what is no limit


def _status(run: Measured) -> list[Finding]:
    summary = run.summary
    if summary.status == "ok":
        return []
    combo = summary.variants.get(summary.candidate or "")
    if combo is not None and combo.exposed:
        return [Finding(summary.run_id, RUN, "honest calls", REGRESSION, reason=f"{summary.candidate}: {combo.error}")]
    why = summary.warnings[0] if summary.warnings else "its warnings say why"
    return [Finding(summary.run_id, RUN, "a complete run", NOT_MEASURED, reason=f"the run is {summary.status}: {why}")]


def _evidence(run: Measured, rules: Rules, reference: Measured | None) -> list[Finding]:
    """Whether everything is active that was enabled, or was active in the reference.

    What the reference could not have either may be unavailable, and what the rules allow on this kind of device, unless
    this very device had it.
    """
    records = run.summary.optimizations
    theirs = reference.summary.optimizations if reference else {}
    allowed = set(rules.unavailable.get(run.device_kind, ()))
    here = reference is not None and same_device(run, reference)
    wrong, excused = [], []
    for name in dict.fromkeys([*run.summary.enabled, *(reference.summary.active if reference else [])]):
        record = records.get(name) or {"status": "off", "reason": None}
        status, before = record["status"], (theirs.get(name) or {}).get("status")
        if status == "active":
            continue
        lost = before == "active" and here
        if status == "unavailable" and (before == "unavailable" or (name in allowed and not lost)):
            excused.append(name)
        else:
            was = ", and was active in the reference" if before == "active" else ""
            reason = " ".join(str(record["reason"] or "").split())
            wrong.append(f"{name} is {status}{was}{f' ({reason})' if reason else ''}")
    said = f"unavailable here, and allowed to be: {', '.join(excused)}" if excused else None
    if wrong:
        return [Finding(run.summary.run_id, EVIDENCE, "all active", REGRESSION, reason="; ".join(wrong))]
    return [Finding(run.summary.run_id, EVIDENCE, "all active", PASSED, reason=said)]


def _broken_clips(run: Measured) -> list[Finding]:
    """Missing, silent or not finite: they count as word error rate 1, and are also told for what they are."""
    ours, theirs = (sum(score.missing for score in run.combo_scores(other)) for other in (False, True))
    if not ours > theirs:
        return []
    n = len(run.combo_scores())
    reason = f"{ours} of {n} clips are missing, silent or not finite, and {theirs} of {run.summary.against}'s"
    return [Finding(run.summary.run_id, CLIPS, "no broken clips", REGRESSION, reason=reason)]


def _withdrawn(run: Measured) -> list[Finding]:
    """A verdict that the summary itself took back, for what was found in the clips that were timed."""
    verdicts = {name: record.verdict for name, record in run.summary.comparison.items()}
    taken_back = [f"{name} {verdict}" for name, verdict in verdicts.items() if verdict.startswith(WITHDRAWN)]
    if not taken_back:
        return []
    return [Finding(run.summary.run_id, RUN, "verdicts that hold", REGRESSION, reason="; ".join(taken_back))]


def _watermark(run: Measured, limit: Limit | None) -> list[Finding]:
    ours, theirs = run.combo_scores(), run.combo_scores(other=True)
    text, run_id = limit.text if limit else WATERMARK, run.summary.run_id
    lost, never = (sum(not is_marked(score) for score in scores) for scores in (ours, theirs))
    if lost > never and any(score.watermark is not None for score in theirs):
        reason = (
            f"not found in {lost} of {len(ours)} clips, and not in {never} of {run.summary.against}'s {len(theirs)}"
        )
        return [Finding(run_id, WATERMARK, text, REGRESSION, reason=reason)]
    asked = [score for score in (*ours, *theirs) if score.watermark is not None]
    if not ours or len(asked) < len(ours) + len(theirs):
        return [Finding(run_id, WATERMARK, text, NOT_MEASURED, reason="its detector was not asked about every clip")]
    if never == len(theirs):
        return [
            Finding(run_id, WATERMARK, text, NOT_MEASURED, reason=f"not found in any clip of {run.summary.against}")
        ]
    return [Finding(run_id, WATERMARK, text, PASSED, reason=f"found in {len(ours) - lost} of {len(ours)} clips")]


def is_marked(score: Score) -> bool:
    return score.watermark is not None and score.watermark >= MARKED


# -------------------------------------------------------------------------------------------- figures


def _applicable(limits: Iterable[Limit], run: Measured) -> list[Limit]:
    """Limits on memory of another kind give way to the one of the run's kind; alone they stay, and are not measured."""
    limits = list(limits)
    ours = any(limit.memory_kind == run.memory_kind for limit in limits)
    return [limit for limit in limits if limit.memory_kind in (None, run.memory_kind) or not ours]


def _figures(run: Measured, limit: Limit, reference: Measured | None) -> list[Finding]:
    names = _names(run, limit, reference)
    if not names:
        reason = "no similarity was measured"
        return [Finding(run.summary.run_id, limit.subject, limit.text, NOT_MEASURED, reason=reason)]
    return [_figure(run, limit, name, reference) for name in names]


def _names(run: Measured, limit: Limit, reference: Measured | None) -> list[str]:
    if limit.metric != EVERY_SIMILARITY:
        return [limit.metric]
    measured = [*run.summary.comparison, *(reference.summary.comparison if reference else ())]
    return [name for name in dict.fromkeys(measured) if name.startswith("sim_")]


def _figure(run: Measured, limit: Limit, name: str, reference: Measured | None) -> Finding:
    metric = stats.metric(name)
    bound = metric.neutral + (limit.amount if metric.above in stats.BAD else -limit.amount)
    subject = limit.memory_kind or name

    def finding(outcome: str, change: stats.Interval | None = None, reason: str | None = None) -> Finding:
        return Finding(run.summary.run_id, subject, limit.text, outcome, metric.kind, change, bound, reason)

    if run.summary.status == "failed":
        return finding(NOT_MEASURED, reason="the run failed")
    if limit.memory_kind not in (None, run.memory_kind):
        return finding(NOT_MEASURED, reason=f"this run's memory is {run.memory_kind}; add a limit for it")
    change = _change(run.summary.comparison.get(name))
    if change is None:
        return finding(NOT_MEASURED, reason="the run has no figure for it")
    if reference is not None:
        before = _change(reference.summary.comparison.get(name))
        if before is None or before.bounds is None:
            return finding(NOT_MEASURED, reason="the reference has no interval for it: accept one that has")
        change = stats.contrast(before, change, metric.kind)
    if change.bounds is None:
        return finding(UNDECIDED, change, f"no interval yet from {change.n}")
    return finding(outcome(change.bounds, bound, metric), change)


def _change(record: Comparison | None) -> stats.Interval | None:
    """A comparison that is there, and whose numbers can be what they are said to be."""
    if record is None or record.value is None:
        return None
    found = interval(record)
    numbers = [found.estimate, *(found.bounds or ())]
    possible = all(map(math.isfinite, numbers)) and (record.kind == "delta" or min(numbers) > 0)
    return found if possible else None


def outcome(bounds: tuple[float, float], bound: float, metric: stats.Metric) -> str:
    """By where the whole interval lies.

    >>> outcome((0.98, 1.04), 1.05, stats.METRICS["rtf"]), outcome((1.01, 1.06), 1.05, stats.METRICS["rtf"])
    ('passed', 'undecided')
    """
    low, high = bounds if metric.above in stats.BAD else (-bounds[1], -bounds[0])
    edge = bound if metric.above in stats.BAD else -bound
    return PASSED if high <= edge else REGRESSION if low > edge else UNDECIDED
