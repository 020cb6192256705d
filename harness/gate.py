"""The regression gate: may this change be merged?

A limit names a metric and how much worse it may get, in a closed little grammar:

    rtf:5%               a ratio metric, in per cent: time or memory may grow by 5 %
    wer:+0.02            an error metric, absolute: may rise by 0.02
    sim_resemblyzer:-0.02    a similarity, absolute: may fall by 0.02

Without a reference the combo is held against the baseline of its own run. With one, its change against its
baseline is held against the reference's change against its own: ratios travel between machines, times do
not. A regression is one only if the whole 95 % interval lies beyond the limit; a figure beyond it whose
interval is not is reported as undecided and passes.

Exit codes: 0 passed, 1 regression, 2 bad input, 3 the run itself is incomplete or failed, so nobody knows.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness import stats
from harness.ablation import interval
from harness.errors import UserError
from harness.results import Comparison, Summary

PASSED, REGRESSION, BAD_INPUT, NO_DATA = 0, 1, 2, 3
DEFAULT_LIMITS = ("rtf:5%", "peak_memory_mb:5%", "wer:+0.02")
"""For a run whose configuration, with its `gate.limits`, was not kept."""

_GRAMMAR = re.compile(r"^(?P<metric>[a-z_0-9]+):(?P<sign>[+-]?)(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)$")


@dataclass(frozen=True)
class Limit:
    """How far `metric` may move in the bad direction: relative for a ratio metric, absolute for a delta."""

    text: str
    metric: str
    amount: float


@dataclass(frozen=True)
class Finding:
    """One limit held against one run; `outcome` is "passed", "regression", "undecided" or "not measured"."""

    run_id: str
    limit: Limit
    outcome: str
    sentence: str


def parse_limit(text: str) -> Limit:
    """Raises UserError for anything outside the grammar."""
    match = _GRAMMAR.match(text.strip())
    known = [*stats.METRICS, "sim_resemblyzer", "sim_wavlm_large_sv"]
    if match is None:
        raise UserError(f"gate limit {text!r}: write metric:amount, such as rtf:5% or wer:+0.02")
    name, percent, sign = match["metric"], match["percent"], match["sign"]
    if name not in stats.METRICS and not name.startswith("sim_"):
        raise UserError(f"gate limit {text!r}: no metric {name!r}; there are {', '.join(known)}")
    metric = stats.metric(name)
    if (metric.kind == "ratio") != (percent == "%"):
        way_out = f"{name}:5%" if metric.kind == "ratio" else f"{name}:{_bad_sign(metric)}0.02"
        raise UserError(f"gate limit {text!r}: {name} is judged as a {metric.kind}; write {way_out}")
    if sign and sign != _bad_sign(metric):
        raise UserError(f"gate limit {text!r}: {name} gets worse in the other direction; drop the sign")
    amount = float(match["amount"])
    return Limit(text, name, amount / 100 if percent else amount)


def _bad_sign(metric: stats.Metric) -> str:
    return "+" if metric.above in stats.BAD else "-"


def check(summary: Summary, limits: Iterable[Limit], reference: Summary | None = None) -> list[Finding]:
    """Each limit held against one run. Raises UserError for a reference that measured something else."""
    if reference is not None:
        _require_same_experiment(summary, reference)
    return [_check_one(summary, limit, reference) for limit in limits]


def exit_code(summaries: Sequence[Summary], findings: Iterable[Finding]) -> int:
    """A regression that was found outranks figures that are missing."""
    outcomes = {finding.outcome for finding in findings}
    if "regression" in outcomes:
        return REGRESSION
    if "not measured" in outcomes or any(summary.status != "ok" for summary in summaries):
        return NO_DATA
    return PASSED


def _require_same_experiment(summary: Summary, reference: Summary) -> None:
    for what in ("combo", "pipeline", "workload", "scenario"):
        ours, theirs = getattr(summary, what), getattr(reference, what)
        if ours != theirs:
            raise UserError(
                f"reference {reference.run_id} measured {what} {theirs!r} and {summary.run_id} {ours!r}: "
                "their ratios mean different things; name a reference of the same experiment"
            )


def _check_one(summary: Summary, limit: Limit, reference: Summary | None) -> Finding:
    metric = stats.metric(limit.metric)
    change = _change(summary.comparison.get(limit.metric))
    if change is not None and reference is not None:
        before = _change(reference.comparison.get(limit.metric))
        change = None if before is None else stats.contrast(before, change, metric.kind)
    against = f"reference {reference.run_id}" if reference else "its own baseline"
    if summary.status == "failed" or change is None or change.bounds is None:
        why = "the run failed" if summary.status == "failed" else "there is no interval for it"
        return Finding(summary.run_id, limit, "not measured", f"{limit.metric} against {against}: not measured, {why}")
    outcome = _outcome(change, limit, metric)
    low, high = change.bounds
    sentence = (
        f"{limit.metric} against {against}: {metric.kind} {change.estimate:.4g} "
        f"({low:.4g} to {high:.4g}, {change.n} pairs), limit {limit.text}: {outcome}"
    )
    return Finding(summary.run_id, limit, outcome, sentence)


def _change(record: Comparison | None) -> stats.Interval | None:
    return None if record is None or record.value is None else interval(record)


def _outcome(change: stats.Interval, limit: Limit, metric: stats.Metric) -> str:
    if metric.above in stats.BAD:
        bound = metric.neutral + limit.amount
        beyond, surely = change.estimate > bound, (change.low or 0.0) > bound
    else:
        bound = metric.neutral - limit.amount
        beyond, surely = change.estimate < bound, (change.high or 0.0) < bound
    return "regression" if surely else "undecided" if beyond else "passed"
