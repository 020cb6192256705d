"""Whatever a run leaves behind becomes a summary and a report, or one line that names the damaged file.

A folder begins as a clean one (`factories.write_rows`) and is then edited: figures of any size or none, rows and files
that are absent, processes that failed, optimizations in any state, names that Markdown would read as its own. What
the harness itself can have written must be told; what it cannot must be refused by name.
"""

import json
import re
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml
from factories import TWELVE, Case, Effect, write_rows
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from harness.__main__ import main
from harness.errors import UserError
from harness.report import plots, verdict_line
from harness.results import BASELINE, PASSES, RunFolder, schema_problem
from harness.summarize import build_summary

quick = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
drawn = settings(
    quick, max_examples=5, phases=(Phase.explicit, Phase.generate)
)  # a report takes seconds; none to shrink

# -- what is drawn -----------------------------------------------------------------------------------------

ODD_NAMES = (
    "a|b",
    "**bold**",
    "`code`",
    "<b>x</b>",
    "naïve-голос",
    "[link](http://x)",
    "two words",
    "_x_",
    "-",
    "$(x)",
)
names = st.one_of(st.just("production"), st.sampled_from(ODD_NAMES))
errors = st.one_of(
    st.none(),
    st.sampled_from(
        ("Traceback ...\nValueError: a | b", "", "\n\n", "`<script>alert(1)</script>`", "it **died**", "x" * 3000)
    ),
)
figure = st.sampled_from((None, 0.0, -0.0, -1.0, 1e-12, 1e-300, 0.04, 1.0, 3.7, 1e9, 1e300, 1.7e308, -1.7e308))
"""As JSON can hold them: what is not finite is stored as null."""
rate = st.one_of(st.none(), st.sampled_from((0.0, 0.5, 1.0, 7.0)))
cosine = st.one_of(st.none(), st.sampled_from((-1.0, 0.0, 1.0)), st.floats(-1, 1))
count = st.one_of(st.none(), st.sampled_from((0, 1, 1000, 10**9)))
statuses = st.sampled_from(("active", "inactive", "unavailable", "failed"))

Edit = Callable[[Path], None]


def cases() -> st.SearchStrategy[Case]:
    enabled = st.lists(st.sampled_from(TWELVE), unique=True, max_size=4).map(tuple)
    effect = st.builds(Effect, time=st.sampled_from((0.03, 0.6, 1.0, 1.5)), memory=st.sampled_from((0.5, 1.0)),
                       wer=st.sampled_from((0.0, 0.2)), audio=st.sampled_from((1.0, 1.0, 0.9)))  # fmt: skip
    return st.builds(
        Case,
        combo=st.one_of(names, st.just(BASELINE)),
        effect=effect,
        enabled=enabled,
        statuses=st.dictionaries(st.sampled_from(TWELVE), st.tuples(statuses, errors), max_size=3),
        pipeline=st.sampled_from(("mini", "random", "a|b <i>")),
        device=st.sampled_from(("Test CPU, 2 cores", "GPU | <80> *GB*")),
        memory_kind=st.sampled_from(("rss", "vram")),
        texts=st.sampled_from((6, 2, 1, 0)),
        rounds=st.sampled_from((1, 2, 0)),
        seeds=st.sampled_from((1, 2, 0)),
        noise=st.sampled_from((0.0, 0.01, 0.5)),
        scored=st.booleans(),
        trained=st.booleans(),
        unmeasured=st.one_of(st.none(), st.just("random weights | speak noise")),
    )


def edits() -> st.SearchStrategy[Edit]:
    """One thing that a run may leave otherwise than a clean one does; rows the most often."""
    files = st.sampled_from(("utterances.jsonl", "scores.jsonl"))
    rows = row_values("utterances.jsonl", UTTERANCE_VALUES)
    scores = row_values("scores.jsonl", SCORE_VALUES)
    shape = st.one_of(
        st.builds(dropped_rows, files, selections()),
        st.builds(doubled_rows, files, selections()),
        st.builds(cut, files, st.integers(0, 400)),
        st.builds(gone, st.sampled_from(SIDE_FILES)),
    )
    thresholds = st.sampled_from((0, 1e-9, 0.5, 3, 1e9, -1.0, float("nan"), float("inf"), None))
    places = st.sampled_from((None, {}, {"name": None}, {"name": "A | *CPU*", "type": "cpu"}))
    side = st.one_of(
        st.builds(threshold, st.sampled_from(("rtf", "memory", "rss", "wer", "sim")), thresholds),
        st.builds(environment, st.sampled_from(("device", "git", "packages", "cpu")), places),
        st.builds(environment, st.sampled_from(("python", "config_hash")), st.sampled_from((None, "", "3 | 4"))),
        st.builds(timing, st.sampled_from(("job_s", "orchestration_s", "orchestration_share", "loading_s")), figure),
    )
    return st.sampled_from((rows, rows, rows, scores, shape, child_values(), side)).flatmap(lambda chosen: chosen)


SIDE_FILES = (
    "children.json", "timing.json", "plan.json", "optimizations.json", "environment.json", "utterances.jsonl",
    "scores.jsonl",
)  # fmt: skip
stages = st.dictionaries(st.sampled_from(("generate_tokens", "mel_to_wave", "a|b")), figure, max_size=3)
UTTERANCE_VALUES: dict[str, st.SearchStrategy] = {
    "generation_time_s": figure,
    "parent_time_s": figure,
    "process": st.integers(0, 2),
    "counts": stages,
    "energy_j": figure,
    "unlikeness": figure,
    "apart": figure,
    "likeness": figure,
    "silent_share": figure,
    "audio_s": figure,
    "peak_memory_mb": figure,
    "level_dbfs": figure,
    "n_tokens": count,
    "pinned_tokens": count,
    "stages_s": stages,
    "memory": stages,
    "batch_size": st.sampled_from((1, 2, 6)),
    "memory_kind": st.sampled_from(("rss", "vram")),
    "status": st.sampled_from(("ok", "failed")),
    "error": errors,
    "silent": st.booleans(),
    "non_finite": st.booleans(),
    "hit_token_cap": st.booleans(),
    "round": st.integers(0, 3),
    "text": st.sampled_from(("", "a | b `c` <i>", "…")),
    "text_id": st.sampled_from(("t0", "a|b", "")),
    "voice": st.sampled_from(("rms", "voices/|odd|.wav")),
    "pass": st.sampled_from(PASSES),
}
SCORE_VALUES: dict[str, st.SearchStrategy] = {
    "wer": rate,
    "sim_resemblyzer": cosine,
    "sim_other": cosine,
    "missing": st.booleans(),
    "reason": errors,
    "hits": st.integers(0, 3),
    "deletions": st.integers(0, 3),
    "text_id": st.sampled_from(("t0", "nowhere")),
    "variant": st.sampled_from((BASELINE, "somebody")),
    "seed": st.integers(0, 3),
}
CHILD_VALUES: dict[str, st.SearchStrategy] = {
    "load_s": figure,
    "process_to_first_utterance_s": figure,
    "model_memory_mb": figure,
    "cpu_in_calls_s": figure,
    "cpu_between_calls_s": figure,
    "memory_kind": st.sampled_from(("rss", "vram")),
    "status": st.sampled_from(("ok", "failed")),
    "error": errors,
    "trained": st.booleans(),
    "quality_unmeasured_reason": st.one_of(st.none(), st.just("it cannot speak | yet")),
}

# -- edits -------------------------------------------------------------------------------------------------


def selections() -> st.SearchStrategy[Callable[[dict, int], bool]]:
    """Which rows: of one variant, one pass, every nth."""

    def select(of_baseline: bool | None, step: str | None, every: int) -> Callable[[dict, int], bool]:
        return lambda row, index: (
            of_baseline in (None, row["variant"] == BASELINE)
            and step in (None, row.get("pass", step))
            and index % every == 0
        )

    return st.builds(
        select, st.one_of(st.none(), st.booleans()), st.one_of(st.none(), st.sampled_from(PASSES)), st.integers(1, 4)
    )


def row_values(file: str, values: dict[str, st.SearchStrategy]) -> st.SearchStrategy[Edit]:
    def one(name: str) -> st.SearchStrategy[Edit]:
        return st.builds(lambda chosen, value: rows_set(file, chosen, name, value), selections(), values[name])

    return st.sampled_from(sorted(values)).flatmap(one)


def change_rows(file: str, change: Callable[[list[dict]], list[dict]]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / file
        if path.exists():
            rows = change([json.loads(line) for line in path.read_text().splitlines()[:-1]])
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return edit


def rows_set(file: str, chosen: Callable[[dict, int], bool], name: str, value: object) -> Edit:
    return change_rows(
        file, lambda rows: [{**row, name: value} if chosen(row, index) else row for index, row in enumerate(rows)]
    )


def dropped_rows(file: str, chosen: Callable[[dict, int], bool]) -> Edit:
    return change_rows(file, lambda rows: [row for index, row in enumerate(rows) if not chosen(row, index)])


def doubled_rows(file: str, chosen: Callable[[dict, int], bool]) -> Edit:
    return change_rows(file, lambda rows: [*rows, *(row for index, row in enumerate(rows) if chosen(row, index))])


def cut(file: str, length: int) -> Edit:
    """As a crash in the midst of writing leaves it."""

    def edit(folder: Path) -> None:
        if (folder / file).exists():
            content = (folder / file).read_bytes()
            (folder / file).write_bytes(content[: max(0, len(content) - length)])

    return edit


def gone(file: str) -> Edit:
    return lambda folder: (folder / file).unlink(missing_ok=True)


def change_json(file: str, change: Callable[[dict], None]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / file
        if path.exists():
            record = json.loads(path.read_text())
            change(record)
            path.write_text(json.dumps(record))

    return edit


def child_values() -> st.SearchStrategy[Edit]:
    def one(name: str) -> st.SearchStrategy[Edit]:
        def edit(of_baseline: bool, value: object) -> Edit:
            def change(children: dict[str, list[dict]]) -> None:
                for variant, processes in children.items():
                    for child in processes if (variant == BASELINE) == of_baseline else []:
                        child[name] = value

            return change_json("children.json", change)

        return st.builds(edit, st.booleans(), CHILD_VALUES[name])

    return st.sampled_from(sorted(CHILD_VALUES)).flatmap(one)


def threshold(name: str, value: float) -> Edit:
    def edit(folder: Path) -> None:
        job = yaml.safe_load((folder / "job.yaml").read_text())
        job.setdefault("measure", {}).setdefault("thresholds", {})[name] = value
        (folder / "job.yaml").write_text(yaml.safe_dump(job))

    return edit


def environment(name: str, value: object) -> Edit:
    return change_json("environment.json", lambda record: record.update({name: value}))


def timing(name: str, value: float | None) -> Edit:
    return change_json("timing.json", lambda record: record.update({name: value}))


def leave(parent: Path, case: Case, changes: list[Edit], minute: int = 0) -> RunFolder:
    folder = write_rows(parent, case, minute)
    for change in changes:
        change(folder.path)
    return folder


@contextmanager
def place():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- what holds for all of them ----------------------------------------------------------------------------


def strict(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


NO_FIGURE = re.compile(r"(?<![\w`])[-−]?(nan|inf|None|NaN|Infinity)(?![\w])|[-−]0(\.0+)?(?![\d.,])")


class Page(HTMLParser):
    """What a browser would make of it: every tag closed in order, nothing that runs, and the text."""

    VOID = ("meta", "img", "br", "hr", "input", "source", "link", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tables: list[list[int]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("b", "i", "a"), "a name became markup"
        assert tag != "script" or self.open[-1] == "body", "a name became a script"
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def assert_told(report: Path) -> None:
    """A report that can be read: figures are figures, tables are tables, pictures show something."""
    markdown, html = report.read_text(), (report.parent / "report.html").read_text()
    for text in (markdown, " ".join(Page(html).text)):
        assert not (found := NO_FIGURE.search(text)), text[max(0, found.start() - 80) : found.end() + 20]
    printed = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    for tables in (Page(html).tables, printed.tables):
        assert all(len(set(columns)) == 1 for columns in tables)
    assert len(Page(html).tables) <= len(printed.tables)
    pictures = re.findall(r"\]\(([^()\s]+\.png)\)", markdown)
    assert sorted(pictures) == sorted(path.name for path in report.parent.glob("*.png"))
    for picture in pictures:
        assert shows_something(report.parent / picture), picture


def shows_something(picture: Path) -> bool:
    """Whether a patch of the colours that stand for figures lies above the legend."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))[:-45]
    colours = {plots.GOOD, plots.BAD, plots.NEUTRAL, plots.INK, *plots.STAGE_COLOURS}
    for colour in colours:
        same = (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1)
        if (same[:-2, :-2] & same[1:-1, 1:-1] & same[2:, 2:] & same[2:, :-2] & same[:-2, 2:]).any():
            return True
    return False


def summarized(folder: RunFolder) -> None:
    summary = build_summary(folder)
    folder.write_summary(summary)
    record = strict(folder.summary_file.read_text())
    assert schema_problem(record) is None
    for name, figure_ in record["comparison"].items():
        value = figure_.get("ratio", figure_.get("delta"))
        assert (value is not None) or figure_["verdict"] == "not measured", name
    assert folder.summary().to_dict() == record
    assert not NO_FIGURE.search(verdict_line(folder.summary()))


# -- the properties ----------------------------------------------------------------------------------------


@quick
@given(case=cases(), changes=st.lists(edits(), max_size=4))
def test_any_run_has_a_summary(case, changes):
    with place() as here:
        summarized(leave(here, case, changes))


@drawn
@given(runs=st.lists(st.tuples(cases(), st.lists(edits(), max_size=4)), min_size=1, max_size=3), lost=errors)
def test_any_runs_have_a_report_and_pass_the_gate_or_not(runs, lost):
    with place() as here:
        results, out = here / "runs", here / "report"
        folders = [leave(results, case, changes, minute) for minute, (case, changes) in enumerate(runs)]
        assert main(["report", str(results), "--out", str(out)]) == 2  # no run has a summary yet
        for folder in folders:
            summarized(folder)
        if lost is not None:
            (results / "failures.txt").write_text(f"vocos: {lost}\n\n")
        assert main(["report", str(results), "--out", str(out)]) == 0
        assert_told(out / "report.md")
        for limits in ([], ["--limit", "rtf:5%", "--limit", "wer:+0.02"]):
            assert main(["gate", str(results), *limits]) in (0, 1, 3)


KEYS = (
    BASELINE,
    "production",
    "status",
    "measure",
    "thresholds",
    "rtf",
    "combo",
    "gate",
    "workload",
    "optimizations",
    "warnings",
)
junk = st.one_of(
    st.sampled_from(
        (b"", b"\xff\xfe", b"\x00", b"null", b"[]", b"3", b"NaN", b"{", b"[" * 100_000, b"9" * 5000, b'{"a": 1}')
    ),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-1, 1), st.just(1e400), st.text(max_size=3)),
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(KEYS), inner, max_size=2)),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode()),
)


@quick
@given(file=st.sampled_from(("job.yaml", "summary.json", *SIDE_FILES)), content=junk, line=st.booleans())
def test_a_damaged_file_is_named_or_does_no_harm(file, content, line):
    with place() as here:
        folder = write_rows(here, Case(texts=1, rounds=1, seeds=1))
        path = folder.path / file
        if line and path.exists():  # in the midst of what was there
            first, _, rest = path.read_bytes().partition(b"\n")
            content = b"\n".join((first, content, rest))
        path.write_bytes(content)
        try:
            if file == "summary.json":
                folder.summary()
            else:
                summarized(folder)
        except UserError as refused:
            message = str(refused)
        else:
            return
        assert str(path) in message
        assert "\n" not in message


def test_a_text_may_hold_what_unicode_counts_as_the_end_of_a_line(tmp_path):
    folder = write_rows(tmp_path, Case(texts=1))
    change_rows("utterances.jsonl", lambda rows: [{**row, "text": "a\u2028b\x85c"} for row in rows])(folder.path)
    content = folder.utterances_file.read_text()
    folder.utterances_file.write_text(content.replace("\\u2028", "\u2028").replace("\\u0085", "\x85"))
    rows, warnings = folder.measurements()
    assert {row.text for row in rows} == {"a\u2028b\x85c"}
    assert warnings == []


def test_a_figure_that_cannot_be_is_left_out_and_said(tmp_path):
    folder = write_rows(tmp_path, Case())
    rows_set("utterances.jsonl", lambda row, _: row["pass"] == "speed", "generation_time_s", -1.0)(folder.path)
    summary = build_summary(folder)
    assert summary.status == "failed"
    assert summary.comparison["rtf"].value is None
    assert any("cannot be" in warning and "generation_time_s -1" in warning for warning in summary.warnings)
