"""The page of a comparison of stages alone: `python -m harness fidelity`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.quality.fidelity import FAITHFUL, judged
from harness.report import html, markdown, plots, tables, words
from harness.report.document import Bullets, Code, Document, Fold, Paragraph, Table
from harness.report.sections import STAGE_BY_STAGE
from harness.results import write_atomically


def write_page(record: Mapping[str, Any], folder: Path) -> Path:
    """report.md, report.html and their picture, from the content of fidelity.json."""
    compared = {name: judged(found["stages"]) for name, found in record["combos"].items() if "stages" in found}
    device = record["environment"]["device"]["name"]
    page = Document(f"Fidelity by stage: the {record['pipeline']} pipeline on {words.said(device)}")
    page.add(Paragraph(STAGE_BY_STAGE), Paragraph("Nothing was timed and nobody listened."))
    with plots.plt.rc_context(plots.STYLE):
        canvas = plots.fidelity(compared, "the baseline")
        page.add(plots.saved(canvas, folder / "fidelity.png") if canvas else None)
    page.add(_overview(compared), Bullets(_left_out(record["combos"])))
    page.add(Fold("Every figure with its interval and its limit", [tables.fidelity(compared)]))
    git, n_texts = record["environment"]["git"], words.count(len(record["cases"]), "text")
    tokens = record["cases"][0]["n_tokens"]
    page.add(Paragraph(f"Over {n_texts} of {tokens} speech tokens, at commit {words.said(str(git['commit'])[:12])}:"))
    page.add(Code(record["command"], "sh"))
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


def _overview(compared: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each combo, its verdict in words where a stage is not faithful."""
    rows = []
    for name, stages in compared.items():
        verdicts = {stage: found["verdict"] for stage, found in stages.items()}
        others = [f"{words.code(stage)} {verdict}" for stage, verdict in verdicts.items() if verdict != FAITHFUL]
        told = []
        for stage, (_, figure) in COLUMNS.items():
            known = stages[stage]["figures"].get(figure)
            told.append(words.fidelity(figure, known["mean"]) if known else "")
        rows.append([words.code(name), *told, "; ".join(others) or FAITHFUL])
    return Table(["", *(title for title, _ in COLUMNS.values()), "verdict"], rows, numeric=frozenset(range(1, 5)))


def _left_out(combos: Mapping[str, Any]) -> list[str]:
    """What was not compared, and what was not applied, with the reasons."""
    lost = {name: one["reason"] for name, one in combos.items() if "reason" in one}
    gone = [f"{words.code(name)} was not compared: {words.stop(words.said(why))}" for name, why in lost.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, one in combos.items():
        for plugin, made in one.get("applied", {}).items():
            if "reason" in made:
                reasons.setdefault((plugin, words.last_line(made["reason"])), []).append(words.code(name))
    return gone + [
        f"{words.code(plugin)} was not applied in {words.listing(names)}: {words.stop(words.said(why))}"
        for (plugin, why), names in reasons.items()
    ]
