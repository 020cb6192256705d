"""Reports: from run folders to one Markdown file, its pictures, and an HTML file that stands alone.

`data` loads the runs, `together` makes one of those that measured the same, `rules` and `claims` judge them;
`sections`, `outcome`, `streams` and `conditions` turn judgement into sentences, `tables` and `plots` into tables and
pictures; `markdown` and `html` print the result.
"""

from collections.abc import Sequence
from pathlib import Path

from harness.report import data, listen, markdown, outcome, rules, sections, words
from harness.report.document import Listening, Paragraph, Section
from harness.report.together import as_one
from harness.results import FAILURES, RunFolder, Summary, slug, write_atomically


def write_report(folders: Sequence[RunFolder], out: Path) -> Path:
    """Write report.md, report.html and their pictures into `out`; gives the path of report.md.

    Raises UserError for a run whose files cannot be read.
    """
    runs = data.load(folders)
    from harness.report import html, plots  # with matplotlib, a second that a folder without runs is not worth

    out.mkdir(parents=True, exist_ok=True)
    settings = data.by_setting(runs)
    figures = {one: plots.draw(as_one(settings[one]), out, suffix) for one, suffix in _suffixes(list(settings)).items()}
    document = sections.build(runs, figures, lost_jobs(folders), _players(as_one(runs)), _parts(runs, out))
    write_atomically(out / "report.html", html.render(document))
    write_atomically(out / "report.md", markdown.render(document))
    return out / "report.md"


def _suffixes(settings: list[str]) -> dict[str, str]:
    """What tells the pictures of one setting from another's, in their files' names."""
    if len(settings) == 1:
        return {settings[0]: ""}
    slugs = [slug(words.plain(setting))[:80] for setting in settings]
    return {
        setting: f"-{name}" if slugs.count(name) == 1 else f"-{name}-{number}"
        for number, (setting, name) in enumerate(zip(settings, slugs, strict=True), start=1)
    }


def _parts(runs: Sequence[data.Run], out: Path) -> Section | None:
    from harness.report import attribution

    places = data.by_place(runs)
    blocks = [
        block
        for place, suffix in _suffixes(list(places)).items()
        for block in attribution.blocks(places[place], out, suffix, place if len(places) > 1 else None)
    ]
    return Section("Which part carries it", [Paragraph(attribution.HOLM), *blocks], open=True) if blocks else None


def _players(runs: Sequence[data.Run]) -> dict[str, Listening]:
    """Of one run, or of the one that many lead to: by ear, one compares two."""
    chosen = runs[0] if len(runs) == 1 else rules.recommended(runs) or rules.candidate(runs)
    players = listen.listening(chosen) if chosen else None
    return {chosen.summary.run_id: players} if chosen and players else {}


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
