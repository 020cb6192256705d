"""What a gate found, for a person, for a job's summary, for JUnit's readers and for a program."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.gate.decide import NOT_MEASURED, PASSED, REGRESSION, UNDECIDED, Finding, Measured

EXIT_PASSED, EXIT_REGRESSION, EXIT_BAD_INPUT, EXIT_UNKNOWN = 0, 1, 2, 3
WORST_FIRST = (REGRESSION, NOT_MEASURED, UNDECIDED, PASSED)


@dataclass(frozen=True)
class Judgement:
    """One run's findings. `repeat` is the command that measures and judges it again; `notes` are worth knowing."""

    run: Measured
    reference: Measured | None
    findings: Sequence[Finding]
    repeat: str
    notes: Sequence[str] = ()

    @property
    def run_id(self) -> str:
        return self.run.summary.run_id

    @property
    def against(self) -> str:
        if self.reference is None:
            return f"its own {self.run.summary.against}"
        summary = self.reference.summary
        return f"reference {summary.run_id} (commit {summary.git}, {summary.device})"

    def outcome(self) -> str:
        return worst(finding.outcome for finding in self.findings)


def worst(outcomes: Iterable[str]) -> str:
    """Nothing asked is nothing known."""
    found = set(outcomes)
    return next((outcome for outcome in WORST_FIRST if outcome in found), NOT_MEASURED)


def exit_code(judgements: Sequence[Judgement], undecided_passes: bool = False) -> int:
    """A regression that was found outranks what nobody knows."""
    outcome = worst(judgement.outcome() for judgement in judgements)
    if outcome == REGRESSION:
        return EXIT_REGRESSION
    return EXIT_PASSED if outcome == PASSED or (outcome == UNDECIDED and undecided_passes) else EXIT_UNKNOWN


# -------------------------------------------------------------------------------------------- words


def figure(finding: Finding) -> str:
    """The change in words: ratio 0.456 (0.454 to 0.458, 120 pairs); empty for what is no figure."""
    change = finding.change
    if change is None:
        return ""
    digits = "{:.3f}" if finding.kind == "ratio" else "{:+.3f}"
    bounds = [digits.format(bound) for bound in change.bounds or ()]
    inside = [f"{bounds[0]} to {bounds[1]}"] if bounds else []
    return f"{finding.kind} {digits.format(change.estimate)} ({', '.join([*inside, f'{change.n} pairs'])})"


def sentence(finding: Finding) -> str:
    parts = [figure(finding), f"limit {finding.limit}" if finding.change else "", finding.reason or ""]
    said = ", ".join(part for part in parts if part)
    return f"{finding.subject}: {finding.outcome}{f': {said}' if said else ''}"


def lines(judgements: Sequence[Judgement]) -> Iterator[str]:
    """For a terminal."""
    for judgement in judgements:
        yield f"{judgement.run_id} against {judgement.against}: {judgement.outcome()}"
        yield from (f"  {sentence(finding)}" for finding in judgement.findings)
        yield from (f"  note: {note}" for note in judgement.notes)
        if judgement.outcome() != PASSED:
            yield f"  again: {judgement.repeat}"


# --------------------------------------------------------------------------------------- machine-read


def markdown(judgements: Sequence[Judgement]) -> str:
    """A section for a job's summary."""
    parts = []
    for judgement in judgements:
        rows = [
            f"| {_cell(finding.subject)} | {finding.outcome} | {_cell(figure(finding))} | {_cell(finding.limit)} "
            f"| {_cell(finding.reason or '')} |"
            for finding in judgement.findings
        ]
        head = f"### Gate: {judgement.outcome()}\n\n`{judgement.run_id}` against {judgement.against}.\n"
        table = "| what | outcome | change (95 % interval) | limit | |\n| --- | --- | --- | --- | --- |"
        notes = "".join(f"\n- {note}" for note in judgement.notes)
        again = f"\nAgain:\n\n```sh\n{judgement.repeat}\n```\n"
        parts.append("\n".join([head, table, *rows, *([notes] if notes else []), again]))
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def junit(judgements: Sequence[Judgement], undecided_passes: bool = False) -> ET.ElementTree:
    """A suite for each run, a case for each finding: regressions fail, what nobody knows is an error."""
    root = ET.Element("testsuites", name="gate")
    for judgement in judgements:
        suite = ET.SubElement(root, "testsuite", name=judgement.run_id)
        counts = dict.fromkeys(("failures", "errors", "skipped"), 0)
        for finding in judgement.findings:
            name = f"{finding.subject} ({finding.limit})"
            case = ET.SubElement(suite, "testcase", classname=judgement.run_id, name=name)
            ET.SubElement(case, "system-out").text = _printable(sentence(finding))
            tag, count = _junit_kind(finding.outcome, undecided_passes)
            if tag:
                counts[count] += 1
                element = ET.SubElement(case, tag, message=_printable(sentence(finding)))
                element.text = _printable(f"against {judgement.against}\nagain: {judgement.repeat}")
        suite.attrib |= {"tests": str(len(judgement.findings))} | {key: str(n) for key, n in counts.items()}
    ET.indent(root)
    return ET.ElementTree(root)


def _junit_kind(outcome: str, undecided_passes: bool) -> tuple[str, str]:
    if outcome == UNDECIDED and undecided_passes:
        return "skipped", "skipped"
    return {PASSED: ("", ""), REGRESSION: ("failure", "failures")}.get(outcome, ("error", "errors"))


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold; a traceback may bring them."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def json_line(judgements: Sequence[Judgement], code: int) -> str:
    """Everything on one line."""
    runs = [
        {
            "run_id": judgement.run_id,
            "status": judgement.run.summary.status,
            "commit": judgement.run.summary.git,
            "device": judgement.run.summary.device,
            "outcome": judgement.outcome(),
            "reference": _reference(judgement.reference),
            "findings": [_record(finding) for finding in judgement.findings],
            "notes": list(judgement.notes),
            "repeat": judgement.repeat,
        }
        for judgement in judgements
    ]
    return json.dumps({"exit_code": code, "runs": runs}, ensure_ascii=False, allow_nan=False)


def _reference(reference: Measured | None) -> dict[str, str] | None:
    if reference is None:
        return None
    summary = reference.summary
    return {"run_id": summary.run_id, "commit": summary.git, "device": summary.device}


def _record(finding: Finding) -> dict[str, Any]:
    change = finding.change
    found = {"estimate": change.estimate, "low": change.low, "high": change.high, "n": change.n} if change else None
    return {
        "subject": finding.subject,
        "limit": finding.limit,
        "outcome": finding.outcome,
        "kind": finding.kind,
        "change": found,
        "bound": finding.bound,
        "reason": finding.reason,
    }
