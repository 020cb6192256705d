"""The report's sections, in order. Every sentence is made from results; none holds a figure of its own."""

from collections.abc import Sequence
from typing import Any

from harness import stats
from harness.ablation import Effect, attribute
from harness.report import claims, rules, tables, words
from harness.report.claims import CANNOT, Finding
from harness.report.conditions import command, conditions, repeat, warnings
from harness.report.data import Run, by_place, ranked
from harness.report.document import Block, Bullets, Code, Document, Figure, Heading, Paragraph
from harness.report.outcome import verdict_sentence

Figures = dict[str, dict[str, Figure]]
"""Each place's pictures by name."""

FEW = 3  # up to so many runs are told in sentences; more of them, in a table
MOST_FACTS = 8  # as many facts fit a paragraph; the rest is in summary.json
RTF_IS = (
    "RTF, the real-time factor, is the wall-clock seconds of generation divided by the seconds of audio "
    "generated, summed over all utterances: lower is faster."
)
ADDED = (
    "What one optimization adds to others, from two runs that differ in just that one. Each run is compared with its "
    "own baseline first, so these intervals hold the noise of both."
)
RATIOS = "Ratios are combo / baseline, so below 1 is faster or smaller; brackets hold the 95 % interval."


def build(runs: Sequence[Run], figures: Figures, failures: Sequence[str]) -> Document:
    """The whole report; `failures` says what became of jobs that left no run."""
    metrics = dict.fromkeys(name for run in runs for name in run.summary.comparison)
    effects = attribute([run.summary for run in runs], metrics)
    findings = [claims.judge(claim, runs) for claim in claims.load_claims()]
    document = Document(_title(runs))
    for section in (
        _executive_summary(runs, findings, failures),
        _baseline(runs),
        _optimizations(runs, effects, findings),
        _combined(runs, figures),
        _quality(runs, figures),
        _recommended(runs),
        _deployment(runs, effects),
        _claims(findings),
        conditions(runs),
        warnings(runs, failures),
        repeat(runs),
    ):
        document.add(*section)
    return document


def _title(runs: Sequence[Run]) -> str:
    what = runs[0].title if len(runs) == 1 else words.count(len(runs), "combo")
    return f"Chatterbox TTS: {what}, {words.listing(list(by_place(runs)))}"


def _place_heading(level: int, place: str, places: dict[str, list[Run]]) -> list[Block]:
    """A heading per place, where there is more than one."""
    return [Heading(level, f"{place[:1].upper()}{place[1:]}")] if len(places) > 1 else []


# --------------------------------------------------------------------------------- executive summary


def _executive_summary(runs: Sequence[Run], findings: Sequence[Finding], failures: Sequence[str]) -> list[Block]:
    places = by_place(runs)
    subject = f"{runs[0].code}" if len(runs) == 1 else words.count(len(runs), "combo")
    blocks: list[Block] = [
        Heading(2, "Executive summary"),
        Paragraph(
            f"This report compares {subject} with the unmodified pipeline of `chatterbox-tts`, using "
            f"{words.listing(list(places))}. Both ran interleaved on the same device and are compared in pairs of "
            f"equal text, voice, seed and number of speech tokens. {RTF_IS} {RATIOS}"
        ),
    ]
    if len(runs) <= FEW:
        blocks.append(Bullets([verdict_sentence(run) for run in runs]))
    else:
        for place, here in places.items():
            blocks += [Paragraph(_overview(place, here)), tables.combos(ranked(here))]
    advice = [_recommendation(place, here) for place, here in places.items()]
    blocks.append(Bullets([*advice, _claims_sentence(findings)]))
    if failures:
        blocks.append(Paragraph(f"{words.count(len(failures), 'job')} left no results: see Warnings."))
    return blocks


def _overview(place: str, runs: Sequence[Run]) -> str:
    faster = [run for run in runs if run.verdict("rtf") == "faster"]
    kept = sum(run.quality() == "kept" for run in faster)
    unknown = sum(run.quality() == stats.NOT_MEASURED for run in runs)
    parts = [
        f"{len(faster)} faster ({kept} of these with quality kept)",
        f"{sum(run.verdict('rtf') == 'slower' for run in runs)} slower",
        f"{sum(run.verdict('peak_memory_mb') == 'less' for run in runs)} with less memory",
        f"{sum(run.quality() == 'worse' for run in runs)} with worse quality",
    ]
    parts += [f"{unknown} whose quality was not measured"] if unknown else []
    return f"{words.count(len(runs), 'combo')} with {place}: {words.listing(parts)}."


def _recommendation(place: str, runs: Sequence[Run]) -> str:
    best = rules.recommended(runs)
    run = best or rules.candidate(runs)
    if run is None:
        return f"No combo is recommended for {place}: none cleared every gate."
    metric = "rtf" if run.verdict("rtf") == "faster" else "peak_memory_mb"
    gain = words.amount_of_change(metric, run.change(metric).value or 1.0)
    if best:
        return f"Recommended for {place}: **{best.title}**, {gain}, quality kept."
    return (
        f"No combo is recommended for {place} yet. The fastest without a detected loss is **{run.title}**, {gain}; "
        f"{rules.objection(run)}: measure {'it' if run.quality() == stats.NOT_MEASURED else 'more texts or seeds'} "
        "before deploying."
    )


def _claims_sentence(findings: Sequence[Finding]) -> str:
    counts = [f"{sum(f.verdict == verdict for f in findings)} {verdict}" for verdict in claims.VERDICTS]
    return f"Of the {len(findings)} figures that the optimization campaign claimed: {', '.join(counts)}."


# ------------------------------------------------------------------------------------------ baseline


def _baseline(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Baseline performance")]
    for place, here in by_place(runs).items():
        known = [run for run in here if run.baseline.rtf is not None]
        if not known:
            blocks.append(Paragraph(f"With {place}, the baseline left no figures."))
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
    spread = " to ".join(dict.fromkeys(words.number(value) for value in (values[0], values[-1])))
    times = "once" if len(runs) == 1 else f"in each of {len(runs)} runs"
    sentences = [f"With {place}, the unmodified pipeline, measured {times}, has an RTF of {spread}."]
    first = runs[0].baseline
    if first.first_call_s and first.warmup_time_s:
        sentences.append(
            f"Its first call takes {words.seconds(first.first_call_s)}, the calls with the same text right after it "
            f"{words.seconds(first.warmup_time_s)}."
        )
    if any(first.stages_s.values()):
        largest = max(first.stages_s, key=lambda name: first.stages_s[name])
        share = words.percent(first.stages_s[largest] / sum(first.stages_s.values()))
        sentences.append(f"Its largest stage is {words.code(largest)} with {share} of the time.")
    return " ".join(sentences)


# ------------------------------------------------------------------------------------- optimizations


def _optimizations(runs: Sequence[Run], effects: Sequence[Effect], findings: Sequence[Finding]) -> list[Block]:
    places = by_place(runs)
    blocks: list[Block] = [
        Heading(2, "Each optimization"),
        Paragraph(
            "Status is what the optimization showed after the run: active with evidence, inactive without it, "
            "unavailable here, or failed. Effects are credited only to what was active, and only where runs tell "
            "them apart from those of others."
        ),
    ]
    for place, here in places.items():
        blocks += _place_heading(3, place, places)
        own = _effects_of(here, effects)
        on, off = _names(here)
        if on:
            blocks.append(tables.optimizations(on, here, own))
        if any(effect.beside for effect in own):
            blocks += [Paragraph(ADDED), tables.added(own)]
        for name in on:
            about = [finding for finding in findings if finding.claim.optimization == name]
            blocks += [Heading(3 + (len(places) > 1), words.code(name)), _optimization(name, here, own, about)]
        if off:
            blocks.append(Paragraph(f"Not part of these runs: {words.listing(off)}."))
    return blocks


def _names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The optimizations that some run had on, and the others, with "not built" where that is the reason."""
    names = dict.fromkeys(name for run in runs for name in run.summary.optimizations)
    on = [name for name in names if any(name in run.summary.enabled for run in runs)]
    off = [
        f"{words.code(name)}{' (not built)' if rules.status_of(name, runs)[0] == 'not built' else ''}"
        for name in names
        if name not in on
    ]
    return on, off


def _effects_of(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Effect]:
    ids = {run.summary.run_id for run in runs}
    return [effect for effect in effects if ids.issuperset(effect.run_ids)]


def _optimization(name: str, runs: Sequence[Run], effects: Sequence[Effect], findings: Sequence[Finding]) -> Paragraph:
    record = rules.record_of(name, runs) or {}
    status = record["status"].capitalize()
    sentences = [f"{status}: {words.last_line(record['reason'])}." if record["reason"] else f"{status}."]
    if record["evidence"]:
        sentences.append(f"Evidence: {words.facts(record['evidence'], MOST_FACTS)}.")
    own = rules.own_effects(name, effects)
    if own:
        beside = next(iter(own.values())).beside
        changes = [_effect_clause(effect) for metric, effect in own.items() if metric in _told(own)]
        where = f"Added to {words.listing(list(map(words.code, beside)))}" if beside else "Alone"
        sentences.append(f"{where}: {'; '.join(changes)}.")
    elif record["status"] == "active":
        _, reason = rules.unattributed(name, runs)
        sentences.append(f"No effect is its own: {reason}.")
    judged = [f"{f.claim.says} ({f.verdict})" for f in findings if f.verdict != CANNOT]
    if judged:
        sentences.append(f"Claimed: {'; '.join(judged)}.")
    return Paragraph(" ".join(sentences))


def _told(effects: dict[str, Effect]) -> list[str]:
    return [name for name in effects if name in ("rtf", "peak_memory_mb", "wer") or name.startswith("sim_")]


def _effect_clause(effect: Effect) -> str:
    kind = stats.metric(effect.metric).kind
    return f"{words.label(effect.metric)} {kind} {words.change(effect.interval, kind)}, {effect.verdict}"


# ------------------------------------------------------------------------- combined impact and quality


def _combined(runs: Sequence[Run], figures: Figures) -> list[Block]:
    places = by_place(runs)
    blocks: list[Block] = [Heading(2, "Combined performance impact")]
    for place, here in places.items():
        blocks += _place_heading(3, place, places)
        blocks += [Paragraph(verdict_sentence(run)) for run in here if run.failed]
        usable = [run for run in ranked(here) if not run.failed]
        shown = usable if len(here) <= FEW else usable[:1]
        for run in shown:
            blocks += [Paragraph(_what_was_on(run)), tables.comparison(run), tables.stages(run)]
        if len(usable) > len(shown):
            blocks.append(Paragraph(f"These tables are {shown[0].code}'s, the fastest; the first table has them all."))
        blocks += [figures[place][name] for name in ("ratio", "rtf", "stages", "memory") if name in figures[place]]
    return blocks


def _what_was_on(run: Run) -> str:
    if run.is_noise_floor:
        return f"{run.code} is the baseline against itself: whatever differs here is noise."
    enabled = words.listing(list(map(words.code, run.summary.enabled)))
    idle = [name for name in run.summary.enabled if name not in run.summary.active]
    records = run.summary.optimizations
    states = [f"{words.code(name)} was {records[name]['status']}" for name in idle]
    return f"{run.code} switches on {enabled}; {words.listing(states) if states else 'all were active'}."


BESIDE_THE_MEAN = (
    "Beside the mean: clips of which more was misunderstood than understood, and the worst; words that were spoken "
    "after the text was over, and words of its end that never came, of all clips together; how long a character of the "
    "text took; clips that ran into the limit of speech tokens, where a combo that does so more often than the "
    "baseline has worse quality."
)


def _quality(runs: Sequence[Run], figures: Figures) -> list[Block]:
    places = by_place(runs)
    measured = [run for run in runs if run.verdict("wer") != stats.NOT_MEASURED and not run.failed]
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
            notes.setdefault(run.combo.quality_note, []).append(f"{run.code}")
    blocks += [
        Paragraph(f"For {words.listing(names)}: {words.stop(words.said(note))}") for note, names in notes.items()
    ]
    if measured:
        blocks.append(tables.quality(measured))
    if told := [run for run in measured if run.baseline.heard and run.combo.heard]:
        blocks += [Paragraph(BESIDE_THE_MEAN), tables.heard(told)]
    blocks += [figures[place]["quality"] for place in places if "quality" in figures[place]]
    return blocks


# -------------------------------------------------------------------------------------------- advice


def _recommended(runs: Sequence[Run]) -> list[Block]:
    places = by_place(runs)
    blocks: list[Block] = [Heading(2, "Recommended configuration")]
    for place, here in places.items():
        shown = rules.recommended(here) or rules.candidate(here)
        blocks.append(Paragraph(_recommendation(place, here)))
        blocks += [Code(_configuration(shown), "yaml")] if shown else []
        others = [run for run in ranked(here) if run is not shown and not run.is_noise_floor]
        blocks += [Bullets([_objection(run) for run in others])] if others else []
    return blocks


def _objection(run: Run) -> str:
    return f"{run.code}: {rules.objection(run) or 'cleared every gate, but is not the fastest'}."


def _configuration(run: Run) -> str:
    """What was active, with its parameters, as it would stand in a combo's file."""
    settings = run.job.get("optimizations") or {}
    lines = [f"# {command(run)}", "optimizations:"]
    for name in run.summary.active:
        parameters = {**(settings.get(name) or {}), "enabled": True}
        lines.append(f"  {name}: {{{', '.join(f'{key}: {_yaml(value)}' for key, value in parameters.items())}}}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _deployment(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Block]:
    places = by_place(runs)
    blocks: list[Block] = [
        Heading(2, "Deployment recommendations"),
        Paragraph(
            "By rule: deploy what is faster or smaller with quality kept, which means that the intervals rule out a "
            "loss that counts; check quality first where they do not, or where it was not measured; keep what is "
            "slower but smaller for where memory is short; leave the rest."
        ),
    ]
    for place, here in places.items():
        blocks += _place_heading(3, place, places)
        on, off = _names(here)
        if on:
            blocks.append(tables.advice([rules.advise(name, here, _effects_of(here, effects)) for name in on]))
        if off:
            blocks.append(Paragraph(f"Nothing can be said from these runs about {words.listing(off)}."))
    return blocks


def _claims(findings: Sequence[Finding]) -> list[Block]:
    held = [finding for finding in findings if finding.verdict != CANNOT]
    rest = [finding for finding in findings if finding.verdict == CANNOT]
    blocks: list[Block] = [
        Heading(2, "Claimed and measured"),
        Paragraph(
            "The figures of the optimization campaign's report beside the measured ones. Confirmed: a change in the "
            "claimed direction was detected and its interval reaches the claim. Not confirmed: no change was detected, "
            "or too small a one. Contradicted: the opposite was detected. A claim about one optimization needs a run "
            "with just that one on."
        ),
    ]
    blocks += [tables.claims(held)] if held else []
    blocks += [tables.unmeasured_claims(rest)] if rest else []
    return blocks
