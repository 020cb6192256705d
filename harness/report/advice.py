"""The report's advice: which configuration to use, how, and what to do with each optimization."""

from collections.abc import Sequence
from typing import Any

from harness import stats
from harness.ablation import Effect
from harness.report import rules, tables, usage, words
from harness.report.conditions import command
from harness.report.data import Run, by_place, by_setting, ranked
from harness.report.document import Block, Bullets, Code, Heading, Paragraph, Section
from harness.results import BASELINE


def recommendation(setting: str, runs: Sequence[Run]) -> str:
    """One sentence: what to use, or why nothing."""
    best = rules.recommended(runs)
    run = best or rules.candidate(runs)
    if runs[0].reference != BASELINE:
        return f"Nothing is recommended for {setting}: that takes a run against the baseline."
    if run is None:
        return f"No combo is recommended for {setting}: none cleared every gate."
    metric = "rtf" if run.verdict("rtf") == "faster" else "peak_memory_mb"
    gain = words.amount_of_change(metric, run.change(metric).value or 1.0)
    if best:
        return f"Recommended for {setting}: **{best.title}**, {gain}, quality kept."
    return (
        f"No combo is recommended for {setting} yet. The fastest without a detected loss is **{run.title}**, {gain}; "
        f"{rules.objection(run)}: measure {'it' if run.quality() == stats.NOT_MEASURED else 'more texts or seeds'} "
        "before deploying."
    )


def recommended(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for setting, here in by_setting(runs).items():
        shown = rules.recommended(here) or rules.candidate(here)
        blocks.append(Paragraph(recommendation(setting, here)))
        if here[0].reference != BASELINE:
            continue
        if shown:
            blocks += [
                Code(_configuration(shown), "yaml"),
                Paragraph("In an application:"),
                Code(usage.lines(shown), "python"),
            ]
        objections: dict[str, list[str]] = {}
        for run in ranked(here):
            if run is not shown and not run.is_noise_floor:
                why = rules.objection(run) or "cleared every gate, but is not the fastest"
                objections.setdefault(why, []).append(run.code)
        others = [f"{words.listing(names)}: {why}." for why, names in objections.items()]
        blocks += [Bullets(others)] if others else []
    return Section("Recommended configuration", blocks, open=True)


def _configuration(run: Run) -> str:
    """What was active as it would stand in a combo's file."""
    lines = [f"# {command(run)}", "optimizations:"]
    for name, parameters in usage.active_parameters(run).items():
        settings = {**parameters, "enabled": True}
        lines.append(f"  {name}: {{{', '.join(f'{key}: {_yaml(value)}' for key, value in settings.items())}}}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def deployment(runs: Sequence[Run], effects: Sequence[Effect]) -> Section:
    places = by_place(runs)
    blocks: list[Block] = [
        Paragraph(
            "By rule: deploy what is faster or smaller with quality kept, which means that the intervals rule out a "
            "loss that counts; check quality first where they do not, or where it was not measured; keep what is "
            "slower but smaller for where memory is short; leave the rest."
        ),
    ]
    for place, here in places.items():
        blocks += [Heading(3, f"{place[:1].upper()}{place[1:]}")] if len(places) > 1 else []
        on, off = rules.names(here)
        if on:
            own = rules.effects_of(here, effects)
            blocks.append(tables.advice([rules.advise(name, here, own) for name in on]))
        if off:
            blocks.append(Paragraph(f"Nothing can be said from these runs about {words.listing(off)}."))
    return Section("Deployment recommendations", blocks)
