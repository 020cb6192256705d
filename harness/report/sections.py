"""The report's sections, in order. Every sentence is made from results; none holds a figure of its own."""

from collections.abc import Sequence
from typing import Any

from harness import stats
from harness.ablation import Effect, attribute
from harness.report import claims, rules, tables, words
from harness.report.claims import Finding
from harness.report.data import Run, by_place, ranked
from harness.report.document import Block, Bullets, Code, Document, Figure, Heading, Paragraph, Table

RTF_IS = (
    "RTF, the real-time factor, is the wall-clock seconds of generation divided by the seconds of audio "
    "generated, summed over all utterances: lower is faster."
)
RATIOS = "Ratios are combo / baseline, so below 1 is faster or smaller; the interval in brackets is the 95 % interval."
EVIDENCE_FACTS = 12  # as many facts fit a paragraph; the rest is in summary.json


def build(runs: Sequence[Run], figures: dict[str, dict[str, Figure]], failures: Sequence[str]) -> Document:
    """The whole report. `figures` holds each place's pictures by name, `failures` what became of lost jobs."""
    effects = attribute([run.summary for run in runs], _metrics(runs))
    findings = [claims.judge(claim, runs) for claim in claims.load_claims()]
    document = Document(_title(runs))
    for section in (
        _executive_summary(runs, findings, failures),
        _baseline(runs, figures),
        _optimizations(runs, effects),
        _combined(runs, figures),
        _quality(runs, figures),
        _recommended(runs),
        _deployment(runs, effects),
        _claims(findings),
        _conditions(runs),
        _warnings(runs, failures),
        _repeat(runs),
    ):
        document.add(*section)
    return document


def _metrics(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.summary.comparison))


def _title(runs: Sequence[Run]) -> str:
    what = runs[0].name if len(runs) == 1 else words.count(len(runs), "combo")
    return f"Chatterbox TTS: {what}, {words.listing(list(by_place(runs)))}"


# --------------------------------------------------------------------------------- executive summary


def verdict_sentence(run: Run) -> str:
    """One run's outcome: speed and memory, never without what became of quality."""
    if run.failed:
        return f"{run.name} failed: {_last_line(run.combo.error or run.baseline.error)}."
    parts = [_change_clause(run, "rtf"), _change_clause(run, "peak_memory_mb")]
    return f"{run.name}: {'; '.join(parts)}; {_quality_clause(run)}."


def _change_clause(run: Run, metric: str) -> str:
    record = run.change(metric)
    name = "time" if metric == "rtf" else words.label(metric)
    if record.value is None:
        return f"{name} not measured"
    if record.verdict in (stats.NO_CHANGE, stats.NOT_MEASURED):
        return f"{record.verdict if record.verdict == stats.NO_CHANGE else 'no verdict'} in {name}, {_ratio(record)}"
    before, after = run.baseline.figure(metric), run.combo.figure(metric)
    return (
        f"**{record.verdict}{' peak memory' if metric == 'peak_memory_mb' else ''}**, "
        f"{words.amount_of_change(metric, record.value)} ({words.label(metric)} {words.figure(metric, before)} "
        f"to {words.figure(metric, after)}, {_ratio(record)})"
    )


def _ratio(record: Any) -> str:
    return f"ratio {words.change(record)}, {words.count(record.n, 'pair')}"


def _quality_clause(run: Run) -> str:
    if run.quality() == stats.NOT_MEASURED:
        return f"quality not measured ({(run.combo.quality_note or 'no scores').rstrip('.')})"
    changes = [
        f"{words.label(name)} {run.change(name).verdict}, {words.change(run.change(name))}"
        for name in run.quality_metrics
    ]
    return f"quality **{run.quality()}** ({'; '.join(changes)})"


def _executive_summary(runs: Sequence[Run], findings: Sequence[Finding], failures: Sequence[str]) -> list[Block]:
    places = by_place(runs)
    subject = runs[0].name if len(runs) == 1 else f"{len(runs)} combos of optimizations"
    blocks: list[Block] = [
        Heading(2, "Executive summary"),
        Paragraph(
            f"This report compares {subject} with the unmodified pipeline of `chatterbox-tts`, "
            f"{words.listing(list(places))}. Both ran interleaved on the same device and are compared in pairs of "
            f"equal text, voice, seed and number of speech tokens. {RTF_IS} {RATIOS}"
        ),
    ]
    if len(runs) <= 3:
        blocks.append(Bullets([words.sentence(verdict_sentence(run)) for run in runs]))
    else:
        for place, here in places.items():
            blocks.append(Paragraph(_overview(place, here)))
            blocks.append(tables.combos(ranked(here), with_place=False))
    advice = [_recommendation_sentence(place, here) for place, here in places.items()]
    blocks.append(Bullets([*advice, _claims_sentence(findings)]))
    if failures:
        blocks.append(Paragraph(f"{words.count(len(failures), 'job')} left no results; see Warnings."))
    return blocks


def _overview(place: str, runs: Sequence[Run]) -> str:
    faster = [run for run in ranked(runs) if run.verdict("rtf") == "faster"]
    kept = [run for run in faster if run.quality() == "kept"]
    worse = [run for run in runs if run.quality() == "worse"]
    unknown = [run for run in runs if run.quality() == stats.NOT_MEASURED]
    parts = [f"{len(faster)} of {words.count(len(runs), 'combo')} are faster ({len(kept)} of them with quality kept)"]
    parts.append(f"{sum(run.verdict('rtf') == 'slower' for run in runs)} slower")
    parts.append(f"{sum(run.verdict('peak_memory_mb') == 'less' for run in runs)} need less memory")
    parts.append(f"{len(worse)} have worse quality")
    if unknown:
        parts.append(f"the quality of {len(unknown)} was not measured")
    return words.sentence(f"On {place}, {', '.join(parts)}")


def _recommendation_sentence(place: str, runs: Sequence[Run]) -> str:
    if best := rules.recommended(runs):
        gain = words.amount_of_change("rtf", best.change("rtf").value or 1.0)
        return f"Recommended for {place}: **{best.name}**, {gain}, quality kept."
    if best := rules.candidate(runs):
        gains = words.listing(best.gains())
        return f"No combo is recommended for {place} yet: {best.name} is {gains}, but its quality was not measured."
    return f"No combo is recommended for {place}: none cleared every gate."


def _claims_sentence(findings: Sequence[Finding]) -> str:
    counts = [f"{sum(f.verdict == verdict for f in findings)} {verdict}" for verdict in claims.VERDICTS]
    return f"Of the {len(findings)} figures that the optimization campaign claimed: {', '.join(counts)}."


# ------------------------------------------------------------------------------------------ baseline


def _baseline(runs: Sequence[Run], figures: dict[str, dict[str, Figure]]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Baseline performance")]
    for place, here in by_place(runs).items():
        known = [run for run in here if run.baseline.rtf is not None]
        if not known:
            blocks.append(Paragraph(f"The baseline left no figures on {place}."))
            continue
        blocks.append(Paragraph(_baseline_sentence(place, known)))
        blocks.append(tables.baseline(known[0]) if len(known) == 1 else tables.baselines(known))
    blocks.append(
        Paragraph(
            "Absolute figures are this device's own and say nothing about another; the ratios are what is judged."
        )
    )
    return blocks


def _baseline_sentence(place: str, runs: Sequence[Run]) -> str:
    values = sorted(run.baseline.rtf or 0.0 for run in runs)
    spread = words.number(values[0]) if len(values) == 1 else f"{words.number(values[0])} to {words.number(values[-1])}"
    first = runs[0].baseline
    penalty = ""
    if first.first_call_s and first.warmup_time_s:
        penalty = (
            f" Its first call takes {words.seconds(first.first_call_s)}, the calls right after it with the same text "
            f"{words.seconds(first.warmup_time_s)}."
        )
    stages = first.stages_s
    largest = max(stages, key=lambda name: stages[name]) if stages else None
    share = (
        f" Its largest stage is `{largest}` with {words.percent(stages[largest] / sum(stages.values()))} of the time."
        if largest
        else ""
    )
    times = "once" if len(runs) == 1 else f"in each of {len(runs)} runs"
    return f"On {place} the unmodified pipeline, measured {times}, has an RTF of {spread}.{penalty}{share}"


# ------------------------------------------------------------------------------------- optimizations


def _optimizations(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Block]:
    blocks: list[Block] = [
        Heading(2, "Each optimization"),
        Paragraph(
            "Status is what the optimization showed after the run: active with evidence, inactive without it, "
            "unavailable here, or failed. Effects are credited only to what was active, and only where a run tells "
            "them apart from those of others."
        ),
    ]
    for place, here in by_place(runs).items():
        own = _effects_of(here, effects)
        names = _names(here)
        if len(by_place(runs)) > 1:
            blocks.append(Heading(3, place[:1].upper() + place[1:]))
        blocks.append(tables.optimizations(names, here, own))
        touched = [name for name in names if rules.status_of(name, here)[0] not in ("off", "not built")]
        for name in touched:
            blocks += [Heading(4 if len(by_place(runs)) > 1 else 3, f"`{name}`"), _optimization(name, here, own)]
        untouched = [f"`{name}`" for name in names if name not in touched]
        if untouched:
            blocks.append(Paragraph(f"Not part of these runs: {words.listing(untouched)}."))
    return blocks


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.summary.optimizations))


def _effects_of(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Effect]:
    ids = {run.summary.run_id for run in runs}
    return [effect for effect in effects if ids.issuperset(effect.run_ids)]


def _optimization(name: str, runs: Sequence[Run], effects: Sequence[Effect]) -> Paragraph:
    record = rules.record_of(name, runs) or {}
    status = record["status"]
    reason = f": {_last_line(record['reason'])}" if record["reason"] else ""
    sentences = [words.sentence(f"{status}{reason}")]
    if record["evidence"]:
        sentences.append(f"Evidence: {_facts(record['evidence'])}.")
    own = rules.own_effects(name, effects)
    for metric, effect in own.items():
        beside = f"Added to {words.listing(list(effect.beside))}" if effect.beside else "Alone"
        kind = stats.metric(metric).kind
        figure = f"{kind} {words.change(effect.interval, kind)}"
        if metric in ("rtf", "peak_memory_mb", "wer") or metric.startswith("sim_"):
            sentences.append(f"{beside}, {words.label(metric)}: {effect.verdict}, {figure}.")
    if status == "active" and not own:
        together = [run.name for run in runs if name in run.summary.active]
        sentences.append(
            f"It was measured only together with others ({words.listing(together)}), so no effect is its own."
        )
    return Paragraph(" ".join(sentences))


def _facts(evidence: dict[str, Any]) -> str:
    flat = list(_flatten(evidence))
    shown = [f"`{key}` {value}" for key, value in flat[:EVIDENCE_FACTS]]
    more = len(flat) - len(shown)
    return ", ".join(shown) + (f", and {more} more in summary.json" if more > 0 else "")


def _flatten(facts: dict[str, Any], prefix: str = ""):
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _fact(value)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return words.number(value, digits=4)
    if isinstance(value, list | tuple):
        shown = ", ".join(_fact(item) for item in value[:6])
        return f"[{shown}{', ...' if len(value) > 6 else ''}]"
    return "none" if value is None else str(value)


# ------------------------------------------------------------------------- combined impact and quality


def _combined(runs: Sequence[Run], figures: dict[str, dict[str, Figure]]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Combined performance impact")]
    for place, here in by_place(runs).items():
        drawn = figures.get(place, {})
        usable = [run for run in here if not run.failed]
        best = ranked(usable)[:1] if len(here) > 3 else usable
        blocks += [Paragraph(words.sentence(verdict_sentence(run))) for run in here if run not in usable]
        for run in best:
            intro = f"{run.name} switches on {words.listing([f'`{name}`' for name in run.summary.enabled])}"
            if run.is_noise_floor:
                intro = f"{run.name} is the baseline against itself, so whatever differs here is noise"
            active = f"; active were {len(run.summary.active)} of {len(run.summary.enabled)}"
            blocks.append(Paragraph(f"{intro}{'' if run.is_noise_floor else active}."))
            blocks += [tables.comparison(run), tables.stages(run)]
        if len(here) > 3 and best:
            blocks.append(
                Paragraph(f"The tables are those of {best[0].name}, the fastest; all combos are in the first table.")
            )
        blocks += [drawn[name] for name in ("ratio", "rtf", "stages", "memory") if name in drawn]
    return blocks


def _quality(runs: Sequence[Run], figures: dict[str, dict[str, Figure]]) -> list[Block]:
    measured = [run for run in runs if run.verdict("wer") != stats.NOT_MEASURED]
    blocks: list[Block] = [
        Heading(2, "Quality"),
        Paragraph(
            "WER is the mean word error rate of the clips as a speech recognizer hears them; similarity is the cosine "
            "between a clip and the voice's reference clip under the named speaker model. A clip that is missing, "
            "silent or not finite counts as WER 1."
        ),
    ]
    notes: dict[str, list[str]] = {}
    for run in runs:
        if run.combo.quality_note:
            notes.setdefault(run.combo.quality_note, []).append(run.name)
    blocks += [Paragraph(f"{words.sentence(note)} ({words.listing(names)})") for note, names in notes.items()]
    if measured:
        blocks.append(tables.quality(measured))
    blocks += [drawn["quality"] for drawn in figures.values() if "quality" in drawn]
    return blocks


# -------------------------------------------------------------------------------------------- advice


def _recommended(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Recommended configuration")]
    for place, here in by_place(runs).items():
        best = rules.recommended(here)
        blocks.append(Paragraph(_recommendation_sentence(place, here)))
        shown = best or rules.candidate(here)
        if shown:
            blocks.append(Code(_configuration(shown), "yaml"))
        others = [run for run in here if run is not best and not run.is_noise_floor]
        reasons = [
            f"{run.name}: {rules.objection(run) or 'cleared every gate, but is not the fastest'}" for run in others
        ]
        if reasons:
            blocks.append(Bullets([words.sentence(reason) for reason in reasons]))
    return blocks


def _configuration(run: Run) -> str:
    """What was active, with its parameters, as it stands in a combo's file."""
    settings = run.job.get("optimizations") or {}
    lines = [f"# {command(run)}", "optimizations:"]
    for name in run.summary.active:
        parameters = {"enabled": True} | {k: v for k, v in (settings.get(name) or {}).items() if k != "enabled"}
        lines.append(f"  {name}: {{{', '.join(f'{key}: {_yaml(value)}' for key, value in parameters.items())}}}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _deployment(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Block]:
    blocks: list[Block] = [
        Heading(2, "Deployment recommendations"),
        Paragraph(
            "By rule: deploy what is faster or smaller with quality not worse; check quality first where it was not "
            "measured; keep what is slower but smaller for where memory is short; leave the rest."
        ),
    ]
    for place, here in by_place(runs).items():
        own = _effects_of(here, effects)
        advices = [rules.advise(name, here, own) for name in _names(here)]
        if len(by_place(runs)) > 1:
            blocks.append(Heading(3, place[:1].upper() + place[1:]))
        blocks.append(tables.advice(advices))
    return blocks


def _claims(findings: Sequence[Finding]) -> list[Block]:
    return [
        Heading(2, "Claimed and measured"),
        Paragraph(
            "The figures of the optimization campaign's report beside the measured ones. Confirmed: a change in the "
            "claimed direction was detected and its interval reaches the claim. Not confirmed: no change was detected, "
            "or too small a one. Contradicted: the opposite was detected. A claim about one optimization needs a run "
            "with just that one on."
        ),
        tables.claims(findings),
    ]


# ------------------------------------------------------------------------ conditions, warnings, repeating


def _conditions(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Measuring conditions")]
    for place, here in by_place(runs).items():
        blocks.append(Table([place, ""], _condition_rows(here)))
        for run in here:
            if run.is_noise_floor:
                blocks.append(
                    Paragraph(f"Noise floor, identical code against itself: {words.sentence(verdict_sentence(run))}")
                )
    limits = {name: value for run in runs for name, value in run.summary.thresholds.items()}
    judged = words.listing(
        [
            f"{words.label(name)} {words.percent(value) if stats.metric(name).kind == 'ratio' else words.number(value)}"
            for name, value in limits.items()
        ]
    )
    blocks.append(
        Paragraph(
            "A verdict needs the whole 95 % interval (paired bootstrap, by text where there are at least "
            f"{stats.MIN_PAIRS} texts, {stats.RESAMPLES:,} resamples) beyond a practical threshold: {judged}. "
            f"Fewer than {stats.MIN_PAIRS} pairs give no verdict. Outliers are reported and kept."
        )
    )
    return blocks


def _condition_rows(runs: Sequence[Run]) -> list[list[str]]:
    run = runs[0]
    environment, summary = run.environment, run.summary
    workload = run.job.get("workload") or {}
    device = environment.get("device")
    details = device if isinstance(device, dict) else {"name": summary.device}
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    rows = {
        "device": ", ".join(f"{key} {_fact(value)}" for key, value in details.items() if value is not None),
        "system": environment.get("system"),
        "processor": ", ".join(f"{key} {_fact(value)}" for key, value in (environment.get("cpu") or {}).items()),
        "Python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "workload": words.listing(sorted({run.summary.workload for run in runs})),
        "seeds": ", ".join(map(str, workload.get("seeds") or [])),
        "voices": ", ".join(map(str, workload.get("voices") or [])),
        "pairs, speed pass": _span([run.change("rtf").n for run in runs]),
        "clips, quality pass": _span([run.combo.n_expected for run in runs]),
        "memory": {"vram": "bytes allocated on the GPU", "rss": "resident set of the process"}[
            run.baseline.memory_kind
        ],
        "orchestration": _orchestration(runs),
        "commit": words.listing(sorted({run.summary.git for run in runs})),
        "configuration": words.listing(sorted({run.summary.config_hash for run in runs})),
        "measured": _span_text([run.summary.created for run in runs]),
    }
    return [[name, str(value)] for name, value in rows.items() if value]


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _span_text(moments: Sequence[str]) -> str:
    first, last = min(moments), max(moments)
    return first if first == last else f"{first} to {last}"


def _orchestration(runs: Sequence[Run]) -> str | None:
    shares = [share for run in runs if (share := run.summary.timing.get("orchestration_share")) is not None]
    return f"at most {words.percent(max(shares))} of a job's time" if shares else None


def _warnings(runs: Sequence[Run], failures: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Warnings")]
    grouped: dict[str, list[str]] = {}
    for run in runs:
        for warning in run.summary.warnings:
            grouped.setdefault(warning, []).append(run.name)
    items = [f"A job left no results: {_last_line(failure)}" for failure in failures]
    for warning, names in grouped.items():
        where = "" if len(runs) == 1 else f" ({words.listing(names) if len(names) < 4 else f'{len(names)} runs'})"
        items.append(f"{words.sentence(warning)}{where}")
    blocks.append(Bullets(items) if items else Paragraph("None."))
    return blocks


def _repeat(runs: Sequence[Run]) -> list[Block]:
    commands = list(dict.fromkeys(command(run) for run in runs))
    again = "python -m harness report " + (str(runs[0].path.parent) if len(runs) > 1 else str(runs[0].path))
    return [
        Heading(2, "How to repeat this"),
        Paragraph("The measurement, and this report from its results:"),
        Code("\n".join([*commands, again]), "sh"),
        Paragraph(f"Runs: {', '.join(f'`{run.summary.run_id}`' for run in runs)}."),
    ]


def command(run: Run) -> str:
    """The command line that measures this run again (its whole configuration is in the run's job.yaml)."""
    job = run.job
    parts = ["python run_sweep.py"]
    sweep = job.get("sweep")
    if sweep == "one_at_a_time":
        parts.append("+sweep=one_at_a_time")
    elif sweep:
        parts += [f"+combo={run.name.split('-without-')[0]}", f"+sweep={sweep}"]
    elif run.name == "custom":
        parts += [f"optimizations.{name}.enabled=true" for name in run.summary.enabled]
    else:
        parts.append(f"+combo={'baseline' if run.is_noise_floor else run.name}")
    parts.append(f"pipeline={run.summary.pipeline}")
    parts.append(f"workload={run.summary.workload}")
    for key in ("measure", "quality"):
        name = (job.get(key) or {}).get("name")
        if name and name != "default":
            parts.append(f"{key}={name}")
    kind = run.environment.get("device")
    if isinstance(kind, dict) and kind.get("type"):
        parts.append(f"device={kind['type']}")
    return " ".join(parts)


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "no reason was given"
