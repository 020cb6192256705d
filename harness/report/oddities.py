"""The report's list of warnings: what was odd about the runs, each oddity once however many runs have it."""

import re
from collections.abc import Sequence

from harness.report import words
from harness.report.data import Run, grouped
from harness.report.document import Bullets, Paragraph, Section

FEW = 3
"""So many runs are named; of more it is their number that is told."""
FIGURE = re.compile(r"(?<![\w.,-])[-−]?\d+(?:[.,]\d+)*(?![\w])")
"""A number in a sentence, none that is part of a name."""
Told = tuple[Run, str]
"""A run and one of its warnings."""


def warnings(runs: Sequence[Run], failures: Sequence[str]) -> Section:
    """Every warning of every run, equal ones together, and those of many runs that differ in their figures only.

    `failures` are jobs that left no run at all.
    """
    told = [(run, warning) for run in runs for warning in run.summary.warnings]
    items = [words.stop(f"A job left no results: {words.last_line(failure)}") for failure in failures]
    for alike in grouped(told, lambda one: tuple(FIGURE.split(_without_its_name(*one)))).values():
        items += [_of_many(alike)] if len(alike) > FEW else _of_few(alike, alone=len(runs) == 1)
    return Section("Warnings", [Bullets(items) if items else Paragraph("There are none.")], open=bool(items))


def _of_few(alike: Sequence[Told], alone: bool) -> list[str]:
    items = []
    for equal in grouped(alike, lambda one: one[1]).values():
        text = words.stop(words.said(equal[0][1]))
        items.append(text if alone else f"{text} ({words.listing([run.code for run, _ in equal])})")
    return items


def _of_many(alike: Sequence[Told]) -> str:
    """One sentence for all; "12 combos: " stands for the combo's name where each has its own."""
    texts = [_without_its_name(*one) for one in alike]
    text = words.stop(words.said(as_one(texts)))
    own = texts != [warning for _, warning in alike]
    return f"{len(alike)} combos: {text}" if own else f"{text} ({len(alike)} runs)"


def as_one(texts: Sequence[str]) -> str:
    """Texts that differ in their figures only: "took 2 to 5 s", where a figure is not the same in all of them."""
    between = FIGURE.split(texts[0])
    spans = [_span(column) for column in zip(*map(FIGURE.findall, texts), strict=True)]
    return "".join(text + span for text, span in zip(between, [*spans, ""], strict=True))


def _span(figures: Sequence[str]) -> str:
    least, most = min(figures, key=_value), max(figures, key=_value)
    return least if _value(least) == _value(most) else f"{least} to {most}"


def _value(figure: str) -> float:
    return float(figure.replace(",", "").replace("−", "-"))


def _without_its_name(run: Run, warning: str) -> str:
    return warning.removeprefix(f"{run.name}: ")
