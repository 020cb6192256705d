"""The report's tables: each one function from runs to rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness import stats
from harness.ablation import Effect
from harness.report import rules, words
from harness.report.claims import Finding
from harness.report.data import Run, is_timed
from harness.report.document import Table
from harness.report.outcome import quality_in_short
from harness.results import Comparison

FIRST_WORDS = "process start to first utterance"
ABSOLUTE = (
    ("rtf", "RTF"),
    ("rtf_p50", "RTF, median utterance"),
    ("rtf_p90", "RTF, 90th percentile"),
    ("generation_time_s", "generation time, mean"),
    ("first_audio_s", "first audio of a stream, mean"),
    ("first_call_s", "first call"),
    ("warmup_time_s", "warm-up calls, mean"),
    ("load_s", "loading"),
    ("process_to_first_utterance_s", FIRST_WORDS),
    ("tokens_per_s", "speech tokens per second"),
    ("model_memory_mb", "model memory"),
    ("peak_memory_mb", "peak memory"),
    ("energy_j_per_audio_s", "energy per second of audio"),
)
LATER = ("load_s", "energy_j_per_audio_s", "first_audio_s")  # not measured everywhere
FINDABLE, ENOUGH = "smallest findable", "rounds for the threshold"
NEGLIGIBLE = 0.005  # share of an utterance's time
JUDGED = (
    "rtf",
    "generation_time_s",
    "first_audio_s",
    "first_call_s",
    "load_s",
    "model_memory_mb",
    "peak_memory_mb",
    "energy_j_per_audio_s",
)
MOST_FACTS = 60


def baseline(run: Run) -> Table:
    """One run's baseline in absolute figures."""
    variant = run.baseline
    rows = [
        [title, words.with_interval(name, getattr(variant, name), variant.intervals.get(name))]
        for name, title in ABSOLUTE
        if name not in LATER or getattr(variant, name) is not None
    ]
    rows += [
        [words.label(name), words.with_interval(name, variant.figure(name), variant.intervals.get(name))]
        for name in run.quality_metrics
    ]
    rows.append(["WER, whole corpus", words.rate(variant.wer_corpus)])
    return Table([words.said(run.reference), run.place], rows, numeric=frozenset({1}))


def baselines(runs: Sequence[Run]) -> Table:
    """The same baseline as every run of a sweep measured it again: lowest, median, highest."""
    rows = []
    for name, title in ABSOLUTE:
        values = sorted(value for run in runs if (value := getattr(run.baseline, name)) is not None)
        if name in LATER and not values:
            continue
        spread = [values[0], values[len(values) // 2], values[-1]] if values else [None] * 3
        rows.append([title, *(words.figure(name, value) for value in spread)])
    return Table(
        [words.said(runs[0].reference), "lowest run", "median run", "highest run"], rows, numeric=frozenset({1, 2, 3})
    )


SIDE_BY_SIDE = ("generation_time_s", "rtf", "tokens_per_s", "peak_memory_mb")


def side_by_side(pipelines: Mapping[str, Sequence[Run]]) -> Table:
    """Several pipelines on one device: each one's reference, and what ran against it, in absolute figures.

    A reference that several runs measured again is the first one's.
    """
    rows: dict[tuple[str, str, str], list[str]] = {}
    for pipeline, runs in pipelines.items():
        for run in runs:
            workload = run.summary.workload
            sides = [(run.reference, run.baseline, "1"), (run.name, run.combo, run.told("rtf"))]
            for name, variant, change in sides:
                figures = [words.figure(metric, getattr(variant, metric)) for metric in SIDE_BY_SIDE]
                row = [words.said(pipeline), words.code(name), words.said(workload), *figures, change]
                rows.setdefault((pipeline, name, workload), row)
    titles = ["seconds an utterance", "RTF", "speech tokens per second", "peak memory", "time, of its reference's"]
    return Table(["pipeline", "variant", "workload", *titles], list(rows.values()), numeric=frozenset(range(3, 7)))


def loads(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """What callers have under load, of each variant, size by size."""
    rows = [
        [
            words.code(name),
            {"closed": "users", "open": "at random"}[one["load"]],
            words.counted(one["size"]),
            *(words.seconds(one[f"first_p{share}_s"]) for share in (50, 90, 99)),
            words.counted(one["underruns"]),
            words.percent(one["continuous_share"]) if one["continuous_share"] else "none",
            words.counted(one["n"]),
            "yes" if one["kept"] else "no",
        ]
        for name, found in sides.items()
        for one in found["levels"]
    ]
    columns = ["variant", "requests come", "at a time", "first audio, median", "90th percentile", "99th percentile"]
    return Table([*columns, "underruns", "without one", "requests", "kept"], rows, frozenset(range(2, 9)))


def at_a_glance(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics that combos are told apart by, each with its column's title."""
    similarity = next((name for run in runs for name in run.similarity), None)
    metrics = ["rtf", "peak_memory_mb", "wer", *([similarity] if similarity else [])]
    return {name: f"{words.label(name)}, {stats.metric(name).kind}" for name in metrics}


def combos(runs: Sequence[Run]) -> Table:
    """All combos of one setting at a glance."""
    metrics = at_a_glance(runs)
    rows = [
        [run.code, *(run.told_and_judged(name) for name in metrics), quality_in_short(run), run.standing]
        for run in runs
    ]
    return Table(["combo", *metrics.values(), "quality", "run"], rows)


def comparison(run: Run) -> Table:
    """One run: both variants' figures, the paired change and its verdict."""
    rows = []
    for name in (name for name in JUDGED if name in run.summary.comparison):
        record = run.change(name)
        if record.value is None and name in LATER:
            continue
        values = (words.figure(name, variant.figure(name)) for variant in (run.baseline, run.combo))
        rows.append([words.label(name), *values, run.told(name), *_judged(record), str(record.n)])
    starts = (words.seconds(variant.process_to_first_utterance_s) for variant in (run.baseline, run.combo))
    rows.append([FIRST_WORDS, *starts, "", "", "", "", ""])
    columns = ["figure", words.said(run.reference), run.title, "ratio", "verdict", FINDABLE, ENOUGH, "pairs"]
    return _without_empty(Table(columns, rows, numeric=frozenset({1, 2, 3, 5, 6, 7})))


def _without_empty(table: Table) -> Table:
    """The table without the columns in which nothing stands."""
    kept = [column for column in range(len(table.columns)) if any(row[column] for row in table.rows)]
    return Table(
        [table.columns[column] for column in kept],
        [[row[column] for column in kept] for row in table.rows],
        frozenset(new for new, column in enumerate(kept) if column in table.numeric),
    )


def _judged(record: Comparison) -> list[str]:
    """Verdict, the smallest change that would have been found, and the rounds that the threshold's size takes."""
    found, rounds = record.smallest_detectable, record.rounds_for_threshold
    return [
        words.verdict(record.verdict, known=record.value is not None),
        "" if found is None else words.size(found, record.kind),
        "" if rounds is None else words.fact(rounds),
    ]


def stages(run: Run) -> Table:
    """Mean seconds per utterance by stage, in both variants; no ratio for what takes no time worth the name."""
    before, after = run.baseline.stages_s, run.combo.stages_s
    whole, new_whole = (sum(stages.values()) or math.inf for stages in (before, after))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, 0.0), after.get(name, 0.0)
        share, new_share = old / whole, new / new_whole
        ratio = words.ratio(new / old) if old and max(share, new_share) > NEGLIGIBLE else ""
        rows.append([words.code(name), words.seconds(old), words.percent(share), words.seconds(new), ratio])
    return Table(
        ["stage", words.said(run.reference), "share", run.title, "ratio"], rows, numeric=frozenset({1, 2, 3, 4})
    )


def quality(runs: Sequence[Run]) -> Table:
    """Both variants' quality and the paired change, one row per run and metric."""
    rows = []
    for run in runs:
        for name in (*run.quality_metrics, *run.timed_metrics, "watermark"):
            record = run.summary.comparison.get(name)
            if record is None or (record.value is None and name == "watermark"):
                continue
            cells = [
                words.with_interval(name, variant.figure(name), variant.intervals.get(name))
                for variant in (run.baseline, run.combo)
            ]
            rows.append(
                [run.title, words.label(name), *cells, words.change(record), *_judged(record), _clips(run, name)]
            )
    columns = [
        "combo",
        "metric",
        "reference",
        "combo",
        "change",
        "verdict",
        FINDABLE,
        "seeds for the threshold",
        "clips",
    ]
    return _without_empty(Table(columns, rows, numeric=frozenset({2, 3, 4, 6, 7, 8})))


def _clips(run: Run, metric: str) -> str:
    """How many clips the combo's figure comes from, and how many of them were missing."""
    if is_timed(metric):
        return str(run.combo.n_timed)
    if metric == "watermark":
        return ""
    missing = f", {run.combo.n_missing} missing" if run.combo.n_missing else ""
    return f"{run.combo.n_scored} of {run.combo.n_expected}{missing}"


def evidence(record: dict[str, Any]) -> Table:
    """What an optimization counted, fact by fact; a nested record's names are joined by dots."""
    facts = list(words.facts(record))
    rows = [[words.code(name), words.said(value)] for name, value in facts[:MOST_FACTS]]
    if len(facts) > MOST_FACTS:
        rows.append([f"{len(facts) - MOST_FACTS} more", "in summary.json"])
    return Table(["evidence", ""], rows)


def heard(runs: Sequence[Run]) -> Table:
    """What a mean word error rate hides, of both variants: baseline, then combo."""
    rows = []
    for run in runs:
        for name, variant in ((words.said(run.reference), run.baseline), (run.title, run.combo)):
            found = variant.heard
            worst = found.get("worst")
            rows.append(
                [
                    name,
                    str(found.get("n_mostly_wrong", "")),
                    words.said(f"{words.rate(worst['wer'])} ({worst['text_id']}, {worst['voice']}, {worst['seed']})")
                    if worst
                    else "",
                    words.rate(found.get("cer")),
                    str(found.get("tail_insertions", "")),
                    str(found.get("tail_deletions", "")),
                    words.seconds(found.get("seconds_per_character")),
                    str(found.get("n_hit_token_cap", "")),
                ]
            )
    columns = ["variant", "clips with WER above 0.5", "worst clip (text, voice, seed)", "character error rate"]
    columns += ["words after the end", "words of the end missing", "time per character", "cut at the limit"]
    return Table(columns, rows, numeric=frozenset({1, 3, 4, 5, 6, 7}))


def fidelity(compared: Mapping[str, dict[str, Any]]) -> Table:
    """By combo and stage, how far it is from the reference's on the reference's own inputs."""
    rows = []
    for title, stages in compared.items():
        for stage, found in stages.items():
            verdict = found["verdict"]
            rows += [
                [title, words.code(stage), words.FIDELITY[name][0], *_span(name, figure), verdict]
                for name, figure in found["figures"].items()
            ] or [[title, words.code(stage), "", "", "", "", verdict]]
    columns = ["combo", "stage", "figure", "mean over texts", "95 % interval, or range", "limit", "verdict"]
    return Table(columns, rows, numeric=frozenset({3, 4, 5}))


def _span(name: str, figure: dict[str, float | None]) -> list[str]:
    """A figure's mean, its bounds and its limit; what is not finite was stored as null."""
    mean, low, high = (words.fidelity(name, figure[key]) for key in ("mean", "low", "high"))
    limit = figure.get("limit")
    return [mean, f"{low} to {high}", "" if limit is None else words.fidelity(name, limit)]


def optimizations(names: Sequence[str], runs: Sequence[Run], effects: Sequence[Effect]) -> Table:
    """Status of each and what it did, alone or added to others."""
    rows = []
    for name in names:
        own = rules.own_effects(name, effects)
        beside = next(iter(own.values())).beside if own else None
        basis = "" if beside is None else f"added to {len(beside)} others" if beside else "alone"
        cells = []
        for metric in ("rtf", "peak_memory_mb", "wer"):
            effect = own.get(metric)
            kind = stats.metric(metric).kind
            cells.append(f"{words.verdict(effect.verdict)}, {words.change(effect.interval, kind)}" if effect else "")
        rows.append([words.code(name), rules.status_of(name, runs)[0], basis, *cells])
    columns = ["optimization", "status", "measured", "time ratio", "peak memory ratio", "WER change"]
    return Table(columns, rows)


def added(effects: Sequence[Effect]) -> Table:
    """What each optimization adds to others, from pairs of runs that differ in just that one."""
    metrics = ("rtf", "peak_memory_mb", "wer")
    cells: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for effect in effects:
        if effect.beside and effect.metric in metrics:
            change = words.change(effect.interval, stats.metric(effect.metric).kind)
            row = cells.setdefault((effect.optimization, effect.beside), {})
            row[effect.metric] = f"{words.verdict(effect.verdict)}, {change}"
    rows = [
        [words.code(name), ", ".join(map(words.said, beside)), *(row.get(metric, "") for metric in metrics)]
        for (name, beside), row in cells.items()
    ]
    return Table(["optimization", "added to", "time ratio", "peak memory ratio", "WER change"], rows)


def advice(advices: Sequence[rules.Advice]) -> Table:
    graded = sorted(advices, key=lambda advice: rules.GRADES.index(advice.grade))
    rows = [[advice.grade, words.code(advice.optimization), advice.reason] for advice in graded]
    return Table(["advice", "optimization", "because"], rows)


def claims(findings: Sequence[Finding]) -> Table:
    """The claims that could be held against a measurement."""
    rows = []
    for finding in findings:
        verdict = f"**{finding.verdict}**" + (f": {finding.reason}" if finding.reason else "")
        rows.append([_about(finding), _claimed(finding), finding.measured, verdict, finding.claim.comparable])
    return Table(["about", "claimed", "measured", "verdict", "how they compare"], rows)


def unmeasured_claims(findings: Sequence[Finding]) -> Table:
    """The claims that could not, by the reason why."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        reasons.setdefault(finding.reason, []).append(f"{_about(finding)}: {_claimed(finding)}")
    rows = [[words.stop(reason[:1].upper() + reason[1:]), "; ".join(claims)] for reason, claims in reasons.items()]
    return Table(["because", "claimed"], rows)


def _about(finding: Finding) -> str:
    claim = finding.claim
    return f"`{claim.optimization}`" if claim.optimization else " or ".join(claim.combos) or "baseline"


def _claimed(finding: Finding) -> str:
    """The claim and its place in the campaign's report."""
    return f"{finding.claim.says} ({finding.claim.where})"
