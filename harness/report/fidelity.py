"""The page of a comparison of stages alone: `python -m harness fidelity`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.quality.fidelity import FAITHFUL, judged
from harness.report import html, markdown, plots, tables, words
from harness.report.document import Bullets, Code, Document, Fold, Paragraph, Table
from harness.report.outcome import unfaithful
from harness.report.sections import STAGE_BY_STAGE
from harness.results import BASELINE, write_atomically


def write_page(record: Mapping[str, Any], folder: Path) -> Path:
    """report.md, report.html and their picture, from the content of fidelity.json."""
    combos = record["combos"]
    compared = {name: judged(found["stages"]) for name, found in combos.items() if "stages" in found}
    device = record["environment"]["device"]["name"]
    page = Document(f"Fidelity by stage: the {record['pipeline']} pipeline on {words.said(device)}")
    page.add(Paragraph(STAGE_BY_STAGE), Paragraph("Nothing was timed and nobody listened."))
    with plots.plt.rc_context(plots.STYLE):
        told = {name: stages for name, stages in compared.items() if _is_active(combos[name])}
        canvas = plots.fidelity(told, "the baseline")
        page.add(plots.saved(canvas, folder / "fidelity.png") if canvas else None)
    page.add(Paragraph(ONCE_MORE) if BASELINE in combos else Paragraph(APPLIED))
    page.add(_overview(combos, compared), Bullets(_left_out(combos)))
    page.add(Fold("Every figure with its interval and its limit", [tables.fidelity(compared)]))
    n_texts, tokens = words.count(len(record["cases"]), "text"), record["cases"][0]["n_tokens"]
    commits = dict.fromkeys(str(found["commit"]) for found in combos.values())
    at = f"at commit{'s' * (len(commits) > 1)} {words.listing(list(commits))}"
    page.add(Paragraph(f"Over {n_texts} of {tokens} speech tokens, {at}:"))
    names = " ".join(name for name in combos if name != BASELINE)
    device = f"--device {record['environment']['device']['type']} --texts {len(record['cases'])} --tokens {tokens}"
    page.add(Code(f"python -m harness fidelity {names} --pipeline {record['pipeline']} {device}", "sh"))
    write_atomically(folder / "report.html", html.render(page))
    write_atomically(folder / "report.md", markdown.render(page))
    return folder / "report.md"


COLUMNS = {
    "generate_tokens": ("T3: KL divergence, mean", "kl_mean"),
    "tokens_to_mel": ("flow: error of the mel", "mel_error"),
    "mel_to_wave": ("vocoder: distance of the wave", "wave_distance_db"),
    "watermark": ("watermark: confidence lost", "mark_lost"),
}
"""The figure that stands for a stage."""


ONCE_MORE = (
    "The first row is the baseline once more, for not even that need be the same to the last bit on a GPU. "
    '"The same" is what is no farther away than that. An optimization counts where its own evidence says that it was '
    "active; of what belongs to no stage, as speaking in pieces or splitting texts does, nothing is told here."
)
APPLIED = (
    "This is an older record: the baseline was not compared with itself, and nobody was asked for evidence. An "
    "optimization counts where what it changed still stood at the end; of what belongs to no stage, as speaking in "
    "pieces or splitting texts does, nothing is told here."
)
SAME = "the same"
COUNTS = ("active", "applied")
"""What the status of an optimization is that counts."""


def _overview(combos: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each combo, and in words what is not faithful and what was not active."""
    rows, itself = [], compared.get(BASELINE)
    for name, found in combos.items():
        stages, told = compared.get(name, {}), []
        for stage, (_, figure) in COLUMNS.items():
            known = stages.get(stage, {}).get("figures", {}).get(figure)
            same = known and name != BASELINE and itself and _is_same(stages[stage], itself[stage])
            told.append(SAME if same else words.fidelity(figure, known["mean"]) if known else "")
        rows.append([words.code(name), *told, "" if name == BASELINE else _verdict(stages, found)])
    return Table(["", *(title for title, _ in COLUMNS.values()), "verdict"], rows, numeric=frozenset(range(1, 5)))


def _is_same(stage: Mapping[str, Any], itself: Mapping[str, Any]) -> bool:
    """Whether no figure of a stage is beyond what the baseline has when it is compared with itself."""
    mine, its = stage["figures"], itself["figures"]
    pairs = [(mine[one]["mean"], its[one]["high"]) for one in its]
    return all(None not in pair and pair[0] <= pair[1] for pair in pairs)


def _is_active(found: Mapping[str, Any]) -> bool:
    return any(made["status"] in COUNTS for made in found.get("applied", {}).values())


def _verdict(stages: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    applied = found.get("applied", {})
    idle = [words.code(name) for name, made in applied.items() if made["status"] not in COUNTS]
    if not stages:
        return "not compared"
    if not _is_active(found):
        return "says nothing: not active"
    return ("; ".join(unfaithful(stages)) or FAITHFUL) + (f", without {words.listing(idle)}" if idle else "")


def _left_out(combos: Mapping[str, Any]) -> list[str]:
    """What was not compared, and what was not active, with the reasons."""
    lost = {name: one["reason"] for name, one in combos.items() if "reason" in one}
    gone = [f"{words.code(name)} was not compared: {words.stop(words.said(why))}" for name, why in lost.items()]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for name, one in combos.items():
        for plugin, made in one.get("applied", {}).items():
            if made["status"] not in COUNTS:
                was = made["status"] if made["status"] == "failed" else f"was {made['status']}"
                key = plugin, was, words.last_line(made["reason"])
                reasons.setdefault(key, []).append(words.code(name))
    return gone + [
        f"{words.code(plugin)} {was} in {words.listing(names)}: {words.stop(why)}"
        for (plugin, was, why), names in reasons.items()
    ]
