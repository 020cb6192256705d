"""The campaign's figures beside ours: claimed, measured, verdict.

`configs/claims.yaml` holds every figure of the campaign report as data: what it is about (an optimization
alone, or a combo), which metric of ours it can be held against, and how. A verdict needs a run in which just
that was on; there are four:

    confirmed                   a change in the claimed direction was detected, and its interval reaches the claim
    not confirmed               no change was detected, or one that falls short of the claim
    contradicted                the opposite was detected
    cannot be measured here     with the reason

A claim of "no change" is confirmed only if the whole interval stays within the practical threshold: failing
to find a difference is not yet having found none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness import stats
from harness.errors import UserError
from harness.locations import CONFIGS
from harness.report import words
from harness.report.data import Run
from harness.results import BASELINE

CLAIMS_FILE = CONFIGS / "claims.yaml"
CONFIRMED, NOT_CONFIRMED, CONTRADICTED = "confirmed", "not confirmed", "contradicted"
CANNOT = "cannot be measured here"
VERDICTS = (CONFIRMED, NOT_CONFIRMED, CONTRADICTED, CANNOT)
KINDS = ("change", "no_change", "absolute", "evidence", "cold_start", "status", "other")
COLD_START = 1.10  # a first call that takes up to this multiple of a warm one has no penalty left
TOLERANCE = 0.10  # how near an absolute figure must come to be the same one


@dataclass(frozen=True)
class Claim:
    """One figure of the campaign report.

    `kind` says how it is held against a run; `expect` holds the kind's own figures (see configs/claims.yaml).
    """

    id: str
    says: str
    where: str
    kind: str
    comparable: str
    optimization: str | None = None
    combos: tuple[str, ...] = ()
    metric: str | None = None
    gpu: bool = False
    device: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    expect: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    claim: Claim
    measured: str
    verdict: str
    reason: str = ""


def load_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """Raises UserError for a file that is not a list of claims."""
    try:
        records = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
        claims = [Claim(**{**record, "combos": tuple(record.get("combos", ()))}) for record in records]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of claims ({' '.join(str(error).split())})") from None
    for claim in claims:
        if claim.kind not in KINDS:
            raise UserError(f"{path}: claim {claim.id} has kind {claim.kind!r}; there are {', '.join(KINDS)}")
    return claims


def judge(claim: Claim, runs: Sequence[Run]) -> Finding:
    """The claim held against the run that fits it best; the reason where none does."""
    if claim.kind == "other":
        return Finding(claim, "", CANNOT, claim.comparable)
    fitting, reason = _fitting(claim, runs)
    if fitting is None:
        return Finding(claim, "", CANNOT, reason)
    measured, verdict, reason = _JUDGES[claim.kind](claim, fitting)
    return Finding(claim, f"{measured}, {fitting.place}" if measured else "", verdict, reason)


def _fitting(claim: Claim, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The run that measured just what the claim is about: on a GPU if there is one, full size before miniature."""
    runs = [run for run in runs if run.summary.against == BASELINE]  # the campaign claims against nothing else
    runs = [run for run in runs if run.reference == BASELINE]  # a claim is about what the baseline becomes
    if claim.optimization is None:
        named = [run for name in claim.combos for run in runs if run.name == name]
        subject = named if claim.combos else list(runs)
        missing = f"no run of the combo {' or '.join(claim.combos)} is in this report"
    else:
        subject = [run for run in runs if _is_about(run, claim) and _has_parameters(run, claim)]
        missing = _why_not_alone(claim, runs)
    if not subject:
        return None, missing
    usable = [run for run in subject if run.baseline.memory_kind == "vram"] if claim.gpu else subject
    if not usable:
        return None, "the claim is about a GPU, and these runs were on a CPU"
    if claim.device:
        usable = [run for run in usable if claim.device in run.summary.device and not _is_miniature(run)]
        if not usable:
            return None, f"an absolute figure of the full-size model on an {claim.device}, which does not travel"
    best = min(usable, key=lambda run: (run.baseline.memory_kind != "vram", _is_miniature(run)))
    if claim.kind == "status":
        return best, ""
    if claim.optimization and claim.optimization not in best.summary.active:
        record = best.summary.optimizations[claim.optimization]
        return None, f"{record['status']}: {words.last_line(record['reason'])}"
    if best.failed:
        return None, f"the run failed: {words.last_line(best.combo.error)}"
    return best, ""


def _why_not_alone(claim: Claim, runs: Sequence[Run]) -> str:
    name = claim.optimization
    having = [run for run in runs if name in run.summary.enabled]
    if not having:
        return f"no run of this report has {name} on"
    if claim.parameters and any(run.summary.enabled == [name] for run in having):
        wanted = words.listing([f"{key}={value}" for key, value in claim.parameters.items()])
        return f"no run has {name} on with {wanted}"
    return f"{name} was on only together with others, in {words.listing([run.title for run in having])}"


def _is_about(run: Run, claim: Claim) -> bool:
    """The optimization alone; in any company for what it shows about itself."""
    if claim.kind in ("status", "evidence"):
        return claim.optimization in run.summary.enabled
    return run.summary.enabled == [claim.optimization]


def _is_miniature(run: Run) -> bool:
    return run.summary.pipeline.startswith("mini")


def _has_parameters(run: Run, claim: Claim) -> bool:
    settings = (run.job.get("optimizations") or {}).get(claim.optimization) or {}
    return all(settings.get(key) == value for key, value in claim.parameters.items())


# ------------------------------------------------------------------------------------ one judge per kind

Judgement = tuple[str, str, str]  # measured, verdict, reason


def _judge_change(claim: Claim, run: Run) -> Judgement:
    """`expect.ratio`: [strongest, weakest] claimed combo / baseline (or the reverse order for an increase)."""
    record = run.change(claim.metric or "")
    measured = f"{run.title}: {words.label(claim.metric or '')} ratio {words.change(record)}"
    if record.low is None or record.high is None:
        return _unjudged(record.value, measured, run)
    metric = stats.metric(claim.metric or "")
    claimed = claim.expect["ratio"]
    decrease = max(claimed) < metric.neutral
    wanted, opposite = (metric.below, metric.above) if decrease else (metric.above, metric.below)
    if record.verdict == opposite:
        return measured, CONTRADICTED, f"{record.verdict}, not {wanted}"
    if record.verdict != wanted:
        return measured, NOT_CONFIRMED, record.verdict
    reaches = record.low <= max(claimed) if decrease else record.high >= min(claimed)
    return (
        measured,
        CONFIRMED if reaches else NOT_CONFIRMED,
        record.verdict + ("" if reaches else ", but short of the claim"),
    )


def _judge_no_change(claim: Claim, run: Run) -> Judgement:
    """The whole interval within the practical threshold; `expect.or_better`: or beyond it on the good side."""
    name = _metric_name(claim, run)
    if name is None:
        return "", CANNOT, words.last_line(run.combo.quality_note or "the metric was not measured")
    record, metric, threshold = run.change(name), stats.metric(name), run.summary.thresholds[name]
    measured = f"{run.title}: {words.label(name)} {metric.kind} {words.change(record)}"
    if record.low is None or record.high is None:
        return _unjudged(record.value, measured, run)
    if metric.kind == "delta" and not run.baseline.trained:
        return "", CANNOT, words.last_line(run.combo.quality_note or "the weights are untrained")
    no_worse = stats.proves_no_worse(record.low, record.high, threshold, metric)
    inside = metric.neutral - threshold <= record.low and record.high <= metric.neutral + threshold
    if inside or (no_worse and claim.expect.get("or_better")):
        return measured, CONFIRMED, "the interval rules out a change that counts"
    if record.verdict in stats.BAD or (record.verdict in stats.GOOD and not claim.expect.get("or_better")):
        return measured, CONTRADICTED, record.verdict
    return measured, NOT_CONFIRMED, "the interval is too wide to rule a change out"


def _metric_name(claim: Claim, run: Run) -> str | None:
    """`metric: similarity` stands for whichever speaker model judged."""
    if claim.metric != "similarity":
        return claim.metric
    return next(iter(run.similarity), None)


def _unjudged(value: float | None, measured: str, run: Run) -> Judgement:
    if value is None:
        return "", CANNOT, words.last_line(run.combo.quality_note or "the metric was not measured")
    return measured, CANNOT, "one observation per process has no interval"


def _judge_absolute(claim: Claim, run: Run) -> Judgement:
    """`expect.value`, `expect.below` or `expect.least`, of the variant `expect.variant`."""
    variant = run.baseline if claim.expect["variant"] == "baseline" else run.combo
    value = variant.figure(claim.metric or "")
    if value is None:
        return "", CANNOT, "the metric was not measured"
    measured = f"{words.label(claim.metric or '')} {words.figure(claim.metric or '', value)}"
    if "below" in claim.expect:
        return measured, CONFIRMED if value < claim.expect["below"] else NOT_CONFIRMED, ""
    if "least" in claim.expect:
        reached = value >= claim.expect["least"]
        return measured, CONFIRMED if reached else CONTRADICTED, "" if reached else "less than claimed"
    near = abs(value / claim.expect["value"] - 1) <= TOLERANCE
    return measured, CONFIRMED if near else NOT_CONFIRMED, f"within {TOLERANCE:.0%}" if near else ""


def _judge_evidence(claim: Claim, run: Run) -> Judgement:
    """A fact that the plugin counted: `expect.fact`, or 1 - after / before for `expect.before` and `.after`."""
    facts = run.summary.optimizations[claim.optimization or ""]["evidence"]
    if "fact" in claim.expect:
        value = facts.get(claim.expect["fact"])
    else:
        before, after = facts.get(claim.expect["before"]), facts.get(claim.expect["after"])
        value = 100 * (1 - after / before) if before and after is not None else None
    if not isinstance(value, int | float):
        return "", CANNOT, "the optimization's evidence does not hold this count"
    low, high = claim.expect["range"]
    measured = f"{words.number(float(value))} %"
    if value >= low:
        return measured, CONFIRMED, "" if value <= high else "and more"
    return measured, CONTRADICTED if value < 0 else NOT_CONFIRMED, "less than claimed"


def _judge_cold_start(claim: Claim, run: Run) -> Judgement:
    """The first call against the warm calls of the same text, right after it in the same process."""
    first, warm = run.combo.first_call_s, run.combo.warmup_time_s
    if not first or not warm:
        return "", CANNOT, "the run has no warm-up calls to compare the first one with"
    own = f"{run.title}: first call {words.number(first / warm)} times a warm one"
    base = run.baseline
    beside = (
        f" (baseline {words.number(base.first_call_s / base.warmup_time_s)})"
        if base.first_call_s and base.warmup_time_s
        else ""
    )
    gone = first / warm <= COLD_START
    return own + beside, CONFIRMED if gone else NOT_CONFIRMED, "one observation"


def _judge_status(claim: Claim, run: Run) -> Judgement:
    """The campaign could not make it run: `expect.not` is the status that would contradict it."""
    record = run.summary.optimizations[claim.optimization or ""]
    if record["status"] == claim.expect["not"]:
        return f"{run.title}: {record['status']}", CONTRADICTED, "it runs, and shows evidence of it"
    return f"{run.title}: {record['status']}", NOT_CONFIRMED, words.last_line(record["reason"])


_JUDGES = {
    "change": _judge_change,
    "no_change": _judge_no_change,
    "absolute": _judge_absolute,
    "evidence": _judge_evidence,
    "cold_start": _judge_cold_start,
    "status": _judge_status,
}
