"""The report's sections, in order. Every sentence is made from results; none holds a figure of its own."""

from collections.abc import Sequence

from harness import stats
from harness.ablation import Effect, attribute
from harness.report import claims, rules, tables, words
from harness.report.advice import deployment, recommendation, recommended
from harness.report.claims import CANNOT, Finding
from harness.report.conditions import conditions, repeat
from harness.report.data import Run, by_device, by_pipeline, by_place, by_setting, ranked
from harness.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Fold,
    Front,
    Heading,
    Listening,
    Paragraph,
    Section,
)
from harness.report.oddities import warnings
from harness.report.outcome import computed, headline, tiles, verdict_sentence
from harness.report.together import as_one, together
from harness.results import BASELINE

Figures = dict[str, dict[str, Figure]]
"""Each setting's pictures by name."""

FEW = 3  # up to so many runs are told in sentences; more of them, in a table
RTF_IS = (
    "RTF, the real-time factor, is the wall-clock seconds of generation divided by the seconds of audio "
    "generated, summed over all utterances: lower is faster."
)
ADDED = (
    "What one optimization adds to others: from one job, where that compared the two; else from two jobs that differ "
    "in just that one, whose interval then holds the noise of both. Of many comparisons some alarm by chance, so these "
    "verdicts hold after Holm's correction for their number."
)
ABSOLUTE_FIGURES = (
    "Different models on the same device, in absolute figures. They come from jobs of their own, so only the last "
    "column is a paired comparison: each variant's with its own pipeline's reference."
)
RATIOS = "A ratio below 1 is faster or smaller; brackets hold the 95 % interval."


def build(
    runs: Sequence[Run],
    figures: Figures,
    failures: Sequence[str],
    listening: dict[str, Listening] | None = None,
    parts: Section | None = None,
) -> Document:
    """The whole report.

    `failures` says what became of jobs that left no run, `listening` holds the players of runs by their id, `parts`
    says which part carries it, where the runs tell.
    """
    metrics = dict.fromkeys(name for run in runs for name in run.summary.comparison)
    combos = as_one(runs)
    effects = attribute([combo.summary for combo in combos], metrics)
    findings = [claims.judge(claim, combos) for claim in claims.load_claims()]
    document = Document(_title(combos))
    front = _front(combos, figures)
    document.add(
        *_executive_summary(combos, front, findings, failures),
        *_listen(runs, listening or {}),
        parts,
        _baseline(runs),
        _side_by_side(combos),
        _optimizations(combos, effects, findings),
        _combined(runs, figures, front.figure),
        _quality(combos, figures),
        recommended(combos),
        deployment(combos, effects),
        _claims(findings),
        conditions(runs),
        warnings(runs, failures),
        repeat(runs),
    )
    return document


def _title(runs: Sequence[Run]) -> str:
    what = runs[0].title if len(runs) == 1 else words.count(len(runs), "combo")
    groups = by_setting(runs) if len(by_setting(runs)) == 1 else by_place(runs)
    return f"Chatterbox TTS: {what}, {words.listing(list(groups))}"


def _heading(level: int, setting: str, settings: dict[str, list[Run]]) -> list[Block]:
    """A heading per setting, where there is more than one."""
    return [Heading(level, f"{setting[:1].upper()}{setting[1:]}")] if len(settings) > 1 else []


# --------------------------------------------------------------------------------- executive summary


def _executive_summary(
    runs: Sequence[Run], front: Front, findings: Sequence[Finding], failures: Sequence[str]
) -> list[Block]:
    settings = by_setting(runs)
    blocks: list[Block] = [front]
    if len(runs) <= FEW:
        blocks.append(Bullets([verdict_sentence(run) for run in runs]))
    else:
        for setting, here in settings.items():
            blocks += [Paragraph(_overview(setting, here)), tables.combos(ranked(here))]
    advice = [recommendation(setting, here) for setting, here in settings.items()]
    blocks.append(Bullets([*advice, _claims_sentence(findings)]))
    if failures:
        blocks.append(Paragraph(f"{words.count(len(failures), 'job')} left no results: see Warnings."))
    return blocks


def _front(runs: Sequence[Run], figures: Figures) -> Front:
    """The verdict in one sentence: of the one run, or of the best of many."""
    settings = by_setting(runs)
    setting, here = next(iter(settings.items()))
    chosen = runs[0] if len(runs) == 1 else rules.recommended(here) or rules.candidate(here)
    drawn = figures.get(setting, {})
    picture = drawn.get("load") or drawn.get("stages" if len(here) == 1 else "ratio")
    sentence = headline(chosen) if chosen else f"Not one of {words.count(len(here), 'combo')} cleared every gate."
    if len(here) > 1 and chosen:
        sentence = f"Of {words.count(len(here), 'combo')}, the best: {sentence}"
    elif len(settings) > 1:
        sentence = f"With {setting}: {sentence}"
    return Front("Executive summary", sentence, tiles(chosen) if chosen and not chosen.failed else [], picture)


def _overview(setting: str, runs: Sequence[Run]) -> str:
    faster = [run for run in runs if run.verdict("rtf") == "faster"]
    kept = sum(run.quality() == "kept" for run in faster)
    unheard = [run for run in runs if run.quality() == stats.NOT_MEASURED]
    compared = sum(bool(run.fidelity) for run in unheard)
    counts = {
        f"faster ({kept} of these with quality kept)": len(faster),
        "slower": sum(run.verdict("rtf") == "slower" for run in runs),
        "with less memory": sum(run.verdict("peak_memory_mb") == "less" for run in runs),
        "with worse quality": sum(run.quality() == "worse" for run in runs),
        "that nobody heard, but whose stages were compared": compared,
        "whose quality was not measured": len(unheard) - compared,
    }
    parts = [f"{n} {what}" for what, n in counts.items() if n]
    return f"{words.count(len(runs), 'combo')} with {setting}: {words.listing(parts) if parts else 'no change found'}."


def _claims_sentence(findings: Sequence[Finding]) -> str:
    counts = [f"{sum(f.verdict == verdict for f in findings)} {verdict}" for verdict in claims.VERDICTS]
    return f"Of the {len(findings)} figures that the optimization campaign claimed: {', '.join(counts)}."


def _listen(runs: Sequence[Run], listening: dict[str, Listening]) -> list[Block]:
    heard = [(run, listening[run.summary.run_id]) for run in runs if run.summary.run_id in listening]
    if not heard:
        return []
    several = len(heard) > 1
    blocks: list[Block] = []
    for run, players in heard:
        blocks += [Heading(3, f"{run.code} beside {run.versus}"), players] if several else [players]
    return [Section("Listen", blocks, open=True)]


# ------------------------------------------------------------------------- combined impact and quality


def _side_by_side(runs: Sequence[Run]) -> Section | None:
    """Pipelines that ran on one device, each unmodified and as fast as it got; None where there is but one."""
    usable = [run for run in ranked(runs) if not run.failed]
    devices = {device: by_pipeline(here) for device, here in by_device(usable).items()}
    several = {device: pipelines for device, pipelines in devices.items() if len(pipelines) > 1}
    if not several:
        return None
    blocks: list[Block] = [Paragraph(ABSOLUTE_FIGURES)]
    for device, pipelines in several.items():
        blocks += [*([Heading(3, device)] if len(several) > 1 else []), tables.side_by_side(pipelines)]
    return Section("Pipelines side by side", blocks, open=True)


def _combined(runs: Sequence[Run], figures: Figures, front: Figure | None) -> Section:
    """`front` is the picture that the reader has seen already."""
    settings = by_setting(runs)
    blocks: list[Block] = [
        Paragraph(
            "Both variants ran interleaved on the same device and are compared in pairs of equal text, voice, seed and "
            f"number of speech tokens. {RTF_IS} {RATIOS}"
        )
    ]
    for setting, here in settings.items():
        blocks += _heading(3, setting, settings)
        blocks += [Paragraph(verdict_sentence(run)) for run in here if run.failed]
        usable = [run for run in here if not run.failed]
        combos, job = ranked(as_one(usable)), {run.path: run for run in usable}
        shown = [job[combo.path] for combo in (combos if len(combos) <= FEW else combos[:1])]
        for run in shown:
            blocks += [Paragraph(_what_was_on(run)), tables.comparison(run), tables.stages(run)]
            blocks += _odd_figures(run)
            blocks += _under_load(run)
        if len(combos) > len(shown):
            blocks.append(Paragraph(f"These tables are {shown[0].code}'s, the fastest; the first table has them all."))
        blocks += together(usable)
        drawn = figures.get(setting, {})
        blocks += [
            drawn[name]
            for name in ("ratio", "rtf", "stages", "memory", "load")
            if name in drawn and drawn[name] != front
        ]
    return Section("Combined performance impact", blocks, open=True)


def _what_was_on(run: Run) -> str:
    if run.is_noise_floor:
        return f"{run.code} is the baseline against itself: whatever differs here is noise."
    records = run.summary.optimizations
    enabled, active = run.summary.enabled, run.summary.active
    states = [f"{words.code(name)} was {records[name]['status']}" for name in enabled if name not in active]
    changed = _difference(run)
    on = words.listing(list(map(words.code, enabled))) if enabled else "nothing"
    return f"{run.code} switches on {on}; {words.listing(states) if states else 'all were active'}.{changed}"


def _difference(run: Run) -> str:
    """What sets the combo apart from a reference that has optimizations of its own."""
    if run.reference == BASELINE:
        return ""
    theirs = [name for name, record in run.summary.against_optimizations.items() if record["enabled"]]
    ours = run.summary.enabled
    parts = [
        f"{word} {words.listing([words.code(name) for name in names])}"
        for word, names in (
            ("with", [name for name in ours if name not in theirs]),
            ("without", [name for name in theirs if name not in ours]),
        )
        if names
    ]
    return f" It is {run.versus} {' and '.join(parts)}." if parts else f" {run.versus} switches on the same."


def _odd_figures(run: Run) -> list[Block]:
    """What a listener has of streams; what would help in a demonstration and not in service."""
    sentences = []
    for name, variant in ((run.reference, run.baseline), (run.name, run.combo)):
        if variant.streaming:
            sentences.append(_streams(name, variant.streaming))
        ratio = variant.repeated_request_ratio
        if ratio is not None:
            sentences.append(
                f"A request that {words.code(name)} has spoken before takes {words.number(ratio)} of the time that it "
                "took then; no such request is in the figures above."
            )
        if variant.growth:
            grown = [f"{words.said(what)} {words.number(amount)}" for what, amount in variant.growth.items()]
            sentences.append(f"In {words.code(name)}, call by call, this grows: {words.listing(grown)}.")
    return [Bullets(sentences)] if sentences else []


def _streams(name: str, heard: dict[str, float | None]) -> str:
    """A variant's streams as a player has them that starts with the first chunk; failed ones count against."""

    def quantiles(what: str, *shares: int) -> str:
        return ", ".join(words.seconds(heard.get(f"{what}_p{share}_s")) for share in shares)

    share, chunks = heard.get("continuous_share"), words.number(heard.get("chunks_mean"))
    apart = f", chunks {quantiles('gap', 50, 99)} apart (median, 99th)" if heard.get("gap_p50_s") is not None else ""
    streams, underruns = (int(heard.get(what) or 0) for what in ("streams", "underruns"))
    return (
        f"Of {streams} streams of {words.code(name)}, {chunks} chunks each: first audio after "
        f"{quantiles('first_audio', 50, 90, 99)} (median, 90th and 99th percentile){apart}; "
        f"{words.percent(share) if share else 'none'} played without an underrun ({underruns} in all); the pre-roll "
        f"that avoids them: {words.seconds(heard.get('preroll_s'))}."
    )


UNDER_LOAD = (
    "Under load: with users, each has a request on its way at any time, and sends the next one when the last is "
    "answered; at random, as many come as make so many seconds of audio a second. First audio and underruns are over "
    "all requests of a load, by the clock of who sends them; one without a whole answer counts as infinitely late. "
    "After the first load that a variant does not keep it is asked for no larger one."
)


def _under_load(run: Run) -> list[Block]:
    sides = {name: side.loaded for name, side in ((run.reference, run.baseline), (run.name, run.combo)) if side.loaded}
    if not sides:
        return []
    sentences = [
        f"{words.code(name)} keeps {words.streams(found['streams'])}: first audio within "
        f"{words.seconds(found['first_audio_limit_s'])} for 99 %, and no underrun "
        f"({words.counted(found['streams_closed'])} users; at random, {words.counted(found['streams_open'])})."
        + (f" WER of {found['n_heard']} clips made under load: {words.rate(found['wer'])}." if found["n_heard"] else "")
        for name, found in sides.items()
    ]
    return [Paragraph(UNDER_LOAD), Bullets(sentences), tables.loads(sides)]


BESIDE_THE_MEAN = (
    "Beside the mean: clips of which more was misunderstood than understood, and the worst; words that were spoken "
    "after the text was over, and words of its end that never came, of all clips together; how long a character of the "
    "text took; clips that ran into the limit of speech tokens, where a combo that does so more often than its "
    "reference has worse quality."
)


STAGE_BY_STAGE = (
    "Fidelity needs no ear and holds for any weights: each stage of the combo is given the reference's own inputs. T3 "
    "is made to say the reference's tokens, and its distributions of the next one are compared; the flow has the same "
    "tokens and noise, the vocoder the same mel, the watermark the same wave. A stage is faithful where the whole "
    "interval of each figure stays within its limit. What differs by intent, as fewer solver steps or fewer bits do, "
    "is for an ear to judge where there is one."
)


def _quality(runs: Sequence[Run], figures: Figures) -> Section:
    measured = [run for run in runs if run.change("wer").value is not None and not run.failed]
    blocks: list[Block] = [
        Paragraph(
            "WER is the mean word error rate of the clips as a speech recognizer hears them; similarity is the cosine "
            "between a clip and the voice's reference clip under the named speaker model. A clip that is missing, "
            "silent or not finite counts as WER 1. Timed clips are some of those whose time was taken, chosen by "
            "chance afterwards."
        ),
    ]
    blocks.append(Bullets([*_heard(measured), *_computed(runs), *_unknown(runs)]))
    if measured:
        blocks.append(tables.quality(measured))
    if told := [run for run in measured if run.baseline.heard and run.combo.heard]:
        blocks += [Paragraph(BESIDE_THE_MEAN), tables.heard(told)]
    blocks += [here["quality"] for here in figures.values() if "quality" in here]
    compared = [run for run in runs if run.fidelity]
    if compared:
        blocks += [Paragraph(STAGE_BY_STAGE), tables.fidelity({run.title: run.fidelity for run in compared})]
        blocks += [here["fidelity"] for here in figures.values() if "fidelity" in here]
    return Section("Quality", blocks, open=bool(measured or compared))


def _heard(runs: Sequence[Run]) -> list[str]:
    """Whose words and voice were judged, and by whom."""
    judges: dict[str, list[str]] = {}
    for run in runs:
        asked = run.job.get("quality") or {}
        words_by, voice_by = (asked.get(f"{kind}_model") or asked.get(kind) or "unknown" for kind in ("asr", "speaker"))
        judges.setdefault(f"words by {words_by}, voice by {voice_by}", []).append(
            f"{run.code} ({words.count(run.combo.n_scored, 'clip')})"
        )
    return [f"**Heard**, {words.said(who)}: {words.listing(names)}." for who, names in judges.items()]


def _computed(runs: Sequence[Run]) -> list[str]:
    """Which stages were compared on the same inputs, and which of them differ."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if told := computed(run):
            found.setdefault(told, []).append(run.code)
    return [f"**Computed**, without an ear: {words.listing(names)}: {what}." for what, names in found.items()]


def _unknown(runs: Sequence[Run]) -> list[str]:
    """What nobody judged, and why."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if run.combo.quality_note:
            reasons.setdefault(words.said(run.combo.quality_note), []).append(run.code)
        if not run.fidelity and not run.failed:
            reasons.setdefault("stages were not compared: quality.fidelity_texts=3 does", []).append(run.code)
    return [f"**Not judged**: {words.listing(names)}: {words.stop(why)}" for why, names in reasons.items()]


# ------------------------------------------------------------------------------------- optimizations


def _optimizations(runs: Sequence[Run], effects: Sequence[Effect], findings: Sequence[Finding]) -> Section:
    places = by_place(runs)
    blocks: list[Block] = [
        Paragraph(
            "Status is what the optimization showed after the run: active with evidence, inactive without it, "
            "unavailable here, or failed. Effects are credited only to what was active, and only where runs tell "
            "them apart from those of others."
        ),
    ]
    for place, here in places.items():
        blocks += _heading(3, place, places)
        own = rules.effects_of(here, effects)
        on, off = rules.names(here)
        if on:
            blocks.append(tables.optimizations(on, here, own))
        if any(effect.beside for effect in own):
            blocks += [Paragraph(ADDED), tables.added(own)]
        blocks += [_optimization(name, here, own, findings) for name in on]
        if off:
            blocks.append(Paragraph(f"Not part of these runs: {words.listing(off)}."))
    return Section("Each optimization", blocks)


def _optimization(name: str, runs: Sequence[Run], effects: Sequence[Effect], findings: Sequence[Finding]) -> Fold:
    """What one optimization showed, did, and was claimed to do."""
    record = rules.record_of(name, runs) or {}
    blocks: list[Block] = []
    if record["reason"]:
        blocks.append(Paragraph(f"{words.stop(words.last_line(record['reason']))}"))
    own = rules.own_effects(name, effects)
    if own:
        beside = next(iter(own.values())).beside
        where = f"Added to {words.listing(list(map(words.code, beside)))}" if beside else "Alone"
        changes = [words.effect(effect) for metric, effect in own.items() if metric in _told(own)]
        blocks.append(Paragraph(f"{where}: {'; '.join(changes)}."))
    elif record["status"] == "active":
        _, reason = rules.unattributed(name, runs)
        blocks.append(Paragraph(f"No effect is its own: {reason}."))
    about = [f for f in findings if f.claim.optimization == name and f.verdict != CANNOT]
    blocks += [Bullets([f"Claimed: {f.claim.says}. {f.verdict.capitalize()}." for f in about])] if about else []
    blocks += [tables.evidence(record["evidence"])] if record["evidence"] else []
    if not blocks:
        blocks.append(Paragraph("It left no evidence."))
    return Fold(f"{words.code(name)}: {record['status']}", blocks)


def _told(effects: dict[str, Effect]) -> list[str]:
    return [name for name in effects if name in ("rtf", "peak_memory_mb", "wer") or name.startswith("sim_")]


# ------------------------------------------------------------------------------------------ baseline


def _baseline(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for setting, here in by_setting(runs).items():
        known = [run for run in here if run.baseline.rtf is not None]
        if not known:
            blocks.append(Paragraph(f"With {setting}, {here[0].versus} left no figures."))
            continue
        blocks.append(Paragraph(_baseline_sentence(known)))
        blocks.append(tables.baseline(known[0]) if len(known) == 1 else tables.baselines(known))
    blocks.append(
        Paragraph(
            "Absolute figures are this device's own and say nothing about another; the ratios are what is judged."
        )
    )
    return Section("Baseline performance", blocks)


def _baseline_sentence(runs: Sequence[Run]) -> str:
    values = sorted(run.baseline.rtf or 0.0 for run in runs)
    spread = " to ".join(dict.fromkeys(words.number(value) for value in (values[0], values[-1])))
    times = "once" if len(runs) == 1 else f"in each of {len(runs)} runs"
    who = "the unmodified pipeline" if runs[0].reference == BASELINE else runs[0].versus
    sentences = [f"With {runs[0].place}, {who}, measured {times}, has an RTF of {spread}."]
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


# -------------------------------------------------------------------------------------------- claims


def _claims(findings: Sequence[Finding]) -> Section:
    held = [finding for finding in findings if finding.verdict != CANNOT]
    rest = [finding for finding in findings if finding.verdict == CANNOT]
    blocks: list[Block] = [
        Paragraph(
            "The figures of the optimization campaign's report beside the measured ones. Confirmed: a change in the "
            "claimed direction was detected and its interval reaches the claim. Not confirmed: no change was detected, "
            "or too small a one. Contradicted: the opposite was detected. A claim about one optimization needs a run "
            "with just that one on."
        ),
    ]
    blocks += [tables.claims(held)] if held else []
    if rest:
        title = f"{words.count(len(rest), 'claim')} that cannot be measured here, and why"
        blocks.append(Fold(title, [tables.unmeasured_claims(rest)]))
    return Section("Claimed and measured", blocks)
