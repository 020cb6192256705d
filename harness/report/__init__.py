"""Reports: from run folders to one Markdown file, its pictures, and an HTML file that stands alone.

`data` loads the runs, `rules` and `claims` judge them; `sections`, `outcome` and `conditions` turn judgement
into sentences, `tables` and `plots` into tables and pictures; `markdown` and `html` print the result.
"""

from collections.abc import Sequence
from pathlib import Path

from harness.report import data, html, markdown, outcome, plots, sections, words
from harness.results import RunFolder, Summary, slug, write_atomically

FAILURES = "failures.txt"


def write_report(folders: Sequence[RunFolder], out: Path) -> Path:
    """Write report.md, report.html and their pictures into `out`; gives the path of report.md.

    Raises UserError for a run whose files cannot be read.
    """
    runs = data.load(folders)
    out.mkdir(parents=True, exist_ok=True)
    places = data.by_place(runs)
    figures = {place: plots.draw(places[place], out, suffix) for place, suffix in _suffixes(list(places)).items()}
    document = sections.build(runs, figures, lost_jobs(folders))
    write_atomically(out / "report.html", html.render(document))
    write_atomically(out / "report.md", markdown.render(document))
    return out / "report.md"


def _suffixes(places: list[str]) -> dict[str, str]:
    """What tells the pictures of one place from another's, in their files' names."""
    if len(places) == 1:
        return {places[0]: ""}
    slugs = [slug(place)[:80] for place in places]
    return {
        place: f"-{name}" if slugs.count(name) == 1 else f"-{name}-{number}"
        for number, (place, name) in enumerate(zip(places, slugs, strict=True), start=1)
    }


def lost_jobs(folders: Sequence[RunFolder]) -> list[str]:
    """What a sweep noted about jobs that left no run: paragraphs of failures.txt beside the runs."""
    files = dict.fromkeys(folder.path.parent / FAILURES for folder in folders)
    return [text for file in files if file.is_file() for text in file.read_text().split("\n\n") if text.strip()]


def report_name(folders: Sequence[RunFolder]) -> str:
    """What the report's folder is called: after the one run, or after the folder that holds them all."""
    if len(folders) == 1:
        return folders[0].run_id
    parents = {folder.path.resolve().parent for folder in folders}
    (parent, *others) = parents
    return f"{folders[-1].run_id}-and-{len(folders) - 1}-more" if others or parent.name == "results" else parent.name


def verdict_line(summary: Summary) -> str:
    """One run's outcome in one line, for a terminal: never speed without quality."""
    run = data.Run(summary, {}, {}, Path(summary.run_id))
    return words.plain(outcome.verdict_sentence(run))
