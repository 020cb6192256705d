"""From a run's rows to its summary: the one place where figures are computed.

Nothing is dropped to make a figure look better. What is missing becomes null with a warning; what failed
in the quality pass counts as word error rate 1; a variant whose time cannot be believed has failed, however
fast it was (`harness.checks`).
"""

import datetime
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from harness import checks, stats
from harness.comparison import compare, free_pairs, objection, pairs, watermark_loss, withdrawn
from harness.figures import calls, figures, outpaces_itself, similarities, timed
from harness.load import FIRST_AUDIO_LIMIT_S
from harness.records import Child
from harness.results import (
    BASELINE,
    NO_EVIDENCE,
    PASSES,
    Comparison,
    Measurement,
    RunFolder,
    Summary,
    Variant,
    told_commit,
)
from harness.sampling import label
from harness.scenarios import scenario
from harness.shapes import without_impossible
from harness.workload import SINGLE_STREAM

TIMING = ("job_s", "loading_s", "measured_s", "evidence_s", "scoring_s", "orchestration_s", "orchestration_share")

PER_PROCESS = ("load_s", "first_call_s", "model_memory_mb")
"""Figures that each process has once; on a CPU, so is peak memory."""
GROWING = {
    "memory_mb": "the memory held [MB]",
    "threads": "the number of its threads",
    "files": "the number of files it holds open",
    "hooks": "the number of hooks on its modules",
    "time": "the time that a second of audio takes [share]",
}
UNPROVEN = "the run ended before its optimizations were asked for evidence: no figure is credited to them."


def build_summary(folder: RunFolder) -> Summary:
    """Everything in summary.json, computed from the folder's other files.

    Works on whatever a run left behind, also an interrupted one. Raises UserError for damaged files.
    """
    rows, row_warnings = folder.measurements()
    scores, score_warnings = folder.scores()
    children, child_warnings = _children(folder)
    timing, _ = without_impossible(folder.read_json("timing.json"))
    job, environment = folder.job(), folder.read_json("environment.json")
    plans = folder.read_json("plan.json")
    warnings = [
        *row_warnings,
        *score_warnings,
        *child_warnings,
        *_given_thresholds(job)[1],
        *timing.get("warnings", []),
    ]

    reference = str(job.get("against") or BASELINE)
    names = list(dict.fromkeys([reference, *children, *(row.variant for row in rows)]))
    candidate = next((name for name in names if name != reference), None)
    variants: dict[str, Variant] = {}
    gaps: list[str] = [] if candidate else [f"only {reference} left rows: there is nothing to compare."]
    paired = pairs(rows, reference, candidate) if candidate else []
    for name in names:
        own, ours = [row for row in rows if row.variant == name], children.get(name, [])
        plan = plans.get(name) or _least_plan(rows)
        judged = [score for score in scores if score.variant == name]
        variant = figures(own, judged, ours, plan.get("quality", 0), _first_audio_limit_s(job))
        problems = checks.failures(own, ours)
        if name == candidate:
            problems += checks.pair_failures(paired, free_pairs(rows, reference, name), reference)
            problems += [loss for loss in [watermark_loss(scores, reference, name)] if loss]
        if problems and variant.status == "ok":
            variant.status, variant.error, variant.exposed = "failed", " ".join(problems), True
        variants[name] = variant
        gaps += _gaps(name, own, plan)
        if not any(child.quality_unmeasured_reason for child in ours):
            gaps += _unscored(name, variant, own, folder)
        warnings += _variant_warnings(name, variant, own)

    manner = (job.get("workload") or {}).get("scenario") or SINGLE_STREAM
    thresholds = _thresholds(job, similarities(scores), manner)
    comparison = compare(
        rows, scores, variants, children, (reference, candidate), thresholds, scenario(manner).compared
    )
    reason = objection(comparison)
    for metric in [figure.name for figure in scenario(manner).compared]:
        comparison[metric] = withdrawn(comparison[metric], reason)
    warnings += [f"{candidate}: {reason}."] if reason else []
    optimizations = _records(folder, job.get("optimizations") or {}, candidate or "")
    switched_on = {name: {"enabled": True} for name in job.get("against_optimizations") or {}}
    against_optimizations = _records(folder, switched_on, reference)
    if candidate and outpaces_itself(row for row in rows if row.variant == candidate):
        warnings += _keeps_results(variants[reference], variants[candidate], candidate)
    gaps += [UNPROVEN] if any(record.get("reason") == NO_EVIDENCE for record in optimizations.values()) else []
    idle = _is_idle(optimizations)
    if idle:
        comparison = {name: _withheld(record) for name, record in comparison.items()}
    fidelity, fidelity_warnings = _fidelity(folder)
    unmeasured = _unmeasured(comparison, variants, (reference, candidate), idle)
    warnings = [
        *gaps,
        *warnings,
        *unmeasured,
        *fidelity_warnings,
        *_uncredited(optimizations),
        *_uncredited(against_optimizations, reference),
    ]
    failed = any(variant.status == "failed" for variant in variants.values())
    return Summary(
        run_id=folder.run_id,
        status="failed" if failed else "incomplete" if gaps else "ok",
        combo=_name(job.get("combo"), default=candidate or reference),
        pipeline=label(job.get("pipeline") or {}),
        device=_name(environment.get("device")),
        workload=_name(job.get("workload")),
        scenario=manner,
        against=reference,
        against_optimizations=against_optimizations,
        processes=max((len(ours) for ours in children.values()), default=1) or 1,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        git=_git(environment.get("git")),
        config_hash=str(environment.get("config_hash") or ""),
        variants=variants,
        comparison=comparison,
        optimizations=optimizations,
        thresholds=thresholds,
        fidelity=fidelity,
        timing={key: timing.get(key) for key in TIMING},
        warnings=list(dict.fromkeys(warnings)),
    )


def _children(folder: RunFolder) -> tuple[dict[str, list[Child]], list[str]]:
    """What is known of each variant's processes, as far as it can be true, and warnings about the rest."""
    children: dict[str, list[Child]] = {}
    warnings = []
    for name, records in folder.read_json("children.json").items():
        children[name] = []
        for record in records if isinstance(records, list) else [records]:  # a single one, before there were several
            possible, wrong = without_impossible(record)
            children[name].append(Child.from_dict(possible))
            warnings += [f"{name}: figures that cannot be are left out: {', '.join(wrong)}."] if wrong else []
    return children, warnings


def _records(folder: RunFolder, switches: dict[str, Any], variant: str) -> dict[str, Any]:
    """What became of each optimization; those that the job switched on and nobody asked for evidence say so."""
    recorded = folder.read_json("optimizations.json").get(variant, {})
    asked_for = [name for name, settings in switches.items() if (settings or {}).get("enabled")]
    silent = {"enabled": True, "status": "inactive", "reason": NO_EVIDENCE, "evidence": {}}
    return recorded | {name: silent for name in asked_for if name not in recorded}


def _name(group: Any, default: str = "unknown") -> str:
    """A config group or a device's record goes by its name."""
    if isinstance(group, dict):
        return str(group.get("name") or default)
    return str(group or default)


def _git(record: Any) -> str:
    if isinstance(record, dict):
        return told_commit(record)
    return str(record or "unknown")


# ----------------------------------------------------------------------------------- what is there


def _counts(rows: Sequence[Measurement]) -> dict[str, int]:
    """Rows per pass; of several variants, the largest count, which is what each should have."""
    per_variant: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row.pass_name, row.variant
        per_variant[key] = per_variant.get(key, 0) + 1
    return {
        step: max((count for (name, _), count in per_variant.items() if name == step), default=0) for step in PASSES
    }


def _least_plan(rows: Sequence[Measurement]) -> dict[str, int]:
    """What a variant owes where no plan was kept: as much as the others have, and something of the speed pass."""
    found = _counts(rows)
    return found | {"speed": max(found["speed"], 1)}


def _gaps(name: str, rows: Sequence[Measurement], expected: dict[str, int]) -> list[str]:
    """What one variant lacks of the planned rows, and what failed."""
    warnings = []
    found = _counts(rows)
    for step in PASSES:
        if found[step] < expected.get(step, 0):
            warnings.append(
                f"{name}: {found[step]} of {expected[step]} rows of the {step} pass are there; "
                "the run was interrupted or the process failed."
            )
    untimed = sum(row.pass_name == "speed" and row.ok for row in rows) - len(timed(rows))
    if untimed:
        warnings.append(f"{name}: {untimed} rows of the speed pass have no time or no audio: no figure is theirs.")
    failures: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        if not row.ok and row.pass_name != "load":  # which a load may be too large for
            failures.setdefault((row.pass_name, last_line(row.error)), []).append(row)
    for (step, error), group in failures.items():
        first = group[0]
        warnings.append(
            f"{name}: {len(group)} rows of the {step} pass failed (first: text {first.text_id}, "
            f"voice {first.voice}, seed {first.seed}): {error}"
        )
    return warnings


def _unscored(name: str, variant: Variant, rows: Sequence[Measurement], folder: RunFolder) -> list[str]:
    kept = sum(row.pass_name == "speed" and row.audio is not None for row in rows)
    return [
        f"{name}: {expected - scored} of {expected} {what} have no score; "
        f"`python -m harness score {folder.path}` scores what is there."
        for what, expected, scored in (
            ("clips of the quality pass", variant.n_expected, variant.n_scored),
            ("timed clips that were kept", kept, variant.n_timed),
        )
        if scored < expected
    ]


def _fidelity(folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """What became of the comparison of stages, and which of them differ or could not be compared."""
    record = folder.read_json("fidelity.json")
    stages = record.get("stages") or {}
    if record.get("reason"):
        return {}, [f"stages were not compared: {record['reason'].rstrip('.')}."]
    by_verdict: dict[str, list[str]] = {}
    for stage, found in stages.items():
        by_verdict.setdefault(found["verdict"], []).append(stage)
    warnings = [
        f"fidelity {text}: {', '.join(by_verdict[verdict])}."
        for verdict, text in (("differs", "differs from the reference's"), (stats.NOT_MEASURED, "was not measured"))
        if verdict in by_verdict
    ]
    return stages, warnings


def _is_idle(optimizations: dict[str, dict[str, Any]]) -> bool:
    """Whether optimizations were switched on and none of them was active."""
    enabled = [record for record in optimizations.values() if record["enabled"]]
    return bool(enabled) and all(record["status"] != "active" for record in enabled)


def _withheld(record: Comparison) -> Comparison:
    """A change in time or memory that nobody made: shown, but not judged."""
    return replace(record, verdict=stats.NOT_MEASURED) if record.kind == "ratio" else record


def _uncredited(optimizations: dict[str, dict[str, Any]], reference: str | None = None) -> list[str]:
    """What was switched on and not active, in the combo or, where one is named, in its reference."""
    whose = f"{reference}: " if reference else ""
    return [
        f"{whose}{name} is enabled but {record['status']} ({last_line(record['reason']).rstrip('.')}): "
        "no figure of this combo is credited to it."
        for name, record in optimizations.items()
        if record["enabled"] and record["status"] != "active"
    ]


def last_line(error: str | None) -> str:
    """What a traceback says in its last line; the whole of it stays in the row."""
    lines = (error or "").strip().splitlines()
    return lines[-1].strip() if lines else "no error was recorded"


def _variant_warnings(name: str, variant: Variant, rows: Sequence[Measurement]) -> list[str]:
    warnings = []
    if variant.status == "failed":
        warnings.append(f"{name} failed: {last_line(variant.error)}")
    warnings += [
        f"{name}: {GROWING[what]} grows by {amount:.3g} a {'round' if what == 'time' else 'call'}, and did not stop: a "
        "service that runs for long will feel it."
        for what, amount in variant.growth.items()
    ]
    spoken = calls(timed(rows))
    paces = [sum(row.time_s or 0.0 for row in call) / sum(row.audio_s or 0.0 for row in call) for call in spoken]
    alike = [call[0].work[:2] if len(call) == 1 else "a batch" for call in spoken]
    warnings += stats.noise_warnings(name, stats.noise(paces, alike))
    quality = [row for row in rows if row.pass_name == "quality"]
    if capped := [f"{row.text_id} (voice {row.voice}, seed {row.seed})" for row in quality if row.hit_token_cap]:
        warnings.append(
            f"{name}: {len(capped)} of {len(quality)} clips ran into the limit of speech tokens and are cut off there, "
            f"which fails their quality: {', '.join(capped)}."
        )
    for flaw, word in (("silent", "silent"), ("non_finite", "not finite")):
        if count := sum(getattr(row, flaw) for row in rows if row.ok):
            warnings.append(f"{name}: the audio of {count} of {len(rows)} rows is {word}.")
    visits = [row for row in rows if row.pass_name == "load"]
    if lost := [row for row in visits if not row.ok]:
        first = f"{last_line(lost[0].error).rstrip('.')}; {lost[0].load} loop, {lost[0].load_size:g} at a time"
        warnings.append(
            f"{name}: {len(lost)} of {len(visits)} requests under load had no whole answer (first: {first})."
        )
    if variant.quality_note:
        warnings.append(f"{name}: {variant.quality_note}")
    if variant.n_missing:
        warnings.append(
            f"{name}: {variant.n_missing} of {variant.n_scored} clips are missing, silent or not finite "
            "and count as WER 1."
        )
    return warnings


def _keeps_results(reference: Variant, variant: Variant, name: str) -> list[str]:
    """What is to be said of a variant that answers a request again in much less time than the reference does."""
    before, after = reference.repeated_request_ratio, variant.repeated_request_ratio
    if not before or after is None or after >= checks.REPEATED_FAST * before:
        return []
    return [
        f"{name}: a request that it had spoken before took {after:.0%} of its time (the reference's: {before:.0%}): it "
        "keeps results, which helps no figure of the speed pass, for no request comes twice there."
    ]


def _thresholds(job: dict[str, Any], similarity_names: Iterable[str], manner: str) -> dict[str, float]:
    """The practical threshold of every metric; `measure.thresholds` in the configuration overrides."""
    given, _ = _given_thresholds(job)
    memory = given.get("memory", stats.METRICS["peak_memory_mb"].threshold)
    time = given.get("rtf", stats.METRICS["rtf"].threshold)
    similarity = given.get("sim", stats.SIMILARITY.threshold)
    return {
        **dict.fromkeys((*(figure.name for figure in scenario(manner).compared), "first_call_s", "load_s"), time),
        **dict.fromkeys(("peak_memory_mb", "model_memory_mb"), memory),
        "energy_j_per_audio_s": time,
        **dict.fromkeys(("wer", "wer_timed"), given.get("wer", stats.METRICS["wer"].threshold)),
        **dict.fromkeys(similarity_names, similarity),
        "watermark": stats.METRICS["watermark"].threshold,
    }


def _first_audio_limit_s(job: dict[str, Any]) -> float:
    """What the configuration says of it, if that is a number above 0."""
    given = (job.get("measure") or {}).get("first_audio_limit_s")
    return float(given) if isinstance(given, int | float) and given > 0 else FIRST_AUDIO_LIMIT_S


def _given_thresholds(job: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Those that the configuration sets, and warnings about what is set to something that is no threshold."""
    given = (job.get("measure") or {}).get("thresholds") or {}
    usable = {name: float(value) for name, value in given.items() if value is not None and 0 <= value < math.inf}
    return usable, [
        f"measure.thresholds.{name} is no number from 0 on: the usual threshold is used."
        for name in given
        if name not in usable
    ]


def _unmeasured(
    comparison: dict[str, Comparison], variants: dict[str, Variant], names: tuple[str, str | None], idle: bool
) -> list[str]:
    """Which figures have no verdict, and why; one warning for each reason. A quality note is a warning already.

    `names` holds the reference's and the candidate's.
    """
    reference, candidate = names
    reasons: dict[str, list[str]] = {}
    for name, record in comparison.items():
        kind = variants[reference].memory_kind if name.startswith(("peak_memory", "energy")) else "vram"
        noted = stats.metric(name).kind == "delta" and any(variant.quality_note for variant in variants.values())
        if record.verdict != stats.NOT_MEASURED or noted:
            continue
        if record.value is not None and idle:
            reason = "no optimization was active, so what differs is not their doing"
        elif record.value is not None and (name in PER_PROCESS or kind == "rss"):
            reason = (
                f"a process has it once, and {record.n} pair{'s' * (record.n > 1)} of processes cannot tell how much "
                f"it varies ({stats.MIN_PROCESSES} can: measure.processes={stats.MIN_PROCESSES})"
            )
        elif record.value is not None:
            reason = f"{record.n} pairs are too few for an interval ({stats.MIN_PAIRS} are needed)"
        elif candidate is None or variants[candidate].status == "failed":
            reason = "the combo failed"
        elif name.startswith("energy") and kind == "rss":
            reason = "only a GPU counts its energy"
        elif variants[reference].figure(name) is None or variants[candidate].figure(name) is None:
            reason = "no rows have it"
        else:
            reason = "the two variants have no work in common"
        reasons.setdefault(reason.rstrip("."), []).append(name)
    return [f"no verdict for {', '.join(names)}: {reason}." for reason, names in reasons.items()]
