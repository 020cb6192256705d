"""The index of reference runs: every run in it, none without a report, and the committed one up to date."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from factories import Case, Effect, make_run, write_rows

from harness.__main__ import main
from harness.errors import UserError
from harness.report import write_report
from harness.report.index import write_front, write_index
from harness.report.overview import write_overview
from harness.results import RunFolder
from harness.summarize import build_summary


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty checkout to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reference(name: str, *cases: Case) -> None:
    """Results of that name, and a report in name alone; several runs are a sweep."""
    results, report = Path("results/reference") / name, Path("reports/reference") / name
    runs = [make_run(Path("made"), case, minute) for minute, case in enumerate(cases)]
    for run in runs:
        target = results / run.summary().combo if len(runs) > 1 else results
        shutil.copytree(run.path, target)
    report.mkdir(parents=True)
    for file in ("report.md", "report.html"):
        (report / file).touch()
    shutil.rmtree("made")


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("| `", "| ["))]


def test_the_committed_index_is_what_the_command_writes(tmp_path):
    for folder in ("results", "reports"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reference").symlink_to(ROOT / folder / "reference")
    written = write_index(tmp_path / "results", tmp_path / "reports").read_text()
    assert (ROOT / "reports" / "README.md").read_text() == written, "run `python -m harness index`"


def test_the_figures_in_the_readme_are_those_of_the_reference_runs(tmp_path):
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    for folder in ("results", "reports"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    assert write_front(Path(readme), tmp_path / "results", tmp_path / "reports")
    assert Path(readme).read_text() == (ROOT / "README.md").read_text(), "run `python -m harness index`"


def test_the_readme_has_a_row_for_each_combo_with_its_hardware_and_nothing_else_changes(here):
    reference("gpu/production-random", Case(pipeline="random", device="Big GPU", memory_kind="vram"))
    reference("cpu/production-mini", Case(effect=Effect(time=0.5, memory=0.8)))
    reference("cpu/one_at_a_time-mini", Case(combo="vocos", enabled=("vocos",)), Case(combo="warmup"))
    readme = Path("README.md")
    readme.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    assert main(["index"]) == 0
    head, text, tail = re.split("<!-- /?figures -->", readme.read_text())
    assert (head, tail) == ("before\n", "\nafter\n")
    gpu, cpu = rows(text)
    assert gpu.startswith("| [`production`](reports/reference/gpu/production-random/report.md) | Big GPU | full size, ")
    assert re.search(
        r"\| Test CPU, 2 cores \| miniature \| (1\.9\d|2\.0\d) \(1\.\d+ to 2\.\d+\) \| 80 % \| kept \|$", cpu
    )


def test_the_readme_tells_what_a_combo_is_without_each_of_its_parts(here):
    parts = ("kv_cache", "warmup")
    slower = {"warmup": 1.0, "kv_cache": 4.0}
    reference(
        "gpu/leave_one_out-mini",
        Case(enabled=parts),
        *(
            Case(
                combo=f"production-without-{part}",
                enabled=tuple(name for name in parts if name != part),
                effect=Effect(time=time),
                against="production",
                reference=parts,
            )
            for part, time in slower.items()
        ),
    )
    marks = "<!-- figures -->\n<!-- /figures -->\n<!-- without gpu/{} -->\nold\n<!-- /without -->\n"
    Path("README.md").write_text(marks.format("leave_one_out-mini"))
    assert main(["index"]) == 0
    _, dearest, idle = rows(Path("README.md").read_text())  # the first is the head
    assert re.match(r"\| `kv_cache` \| (3\.9|4\.0)\d* \(.*\) \| 100 % \| slower \|$", dearest)
    assert idle.startswith("| `warmup` | ")
    Path("README.md").write_text(marks.format("nowhere"))
    assert main(["index"]) == 2


@pytest.mark.slow
def test_each_reference_run_is_a_row_that_leads_to_its_report(here, capsys):
    reference("gpu/production-mini", Case(effect=Effect(time=0.5, memory=0.8)))
    reference("gpu/careful-mini", Case(combo="careful", effect=Effect(time=1.0)))
    assert main(["index"]) == 0
    assert capsys.readouterr().out.split() == ["reports/README.md", "reports/index.html"]
    text = Path("reports/README.md").read_text()
    careful, production = rows(text)
    assert production.startswith("| [`production`](reference/gpu/production-mini/report.md) | mini | quick |")
    assert "faster | 0.8" in production
    assert production.endswith("| kept | 0123456789ab |")
    assert "no detectable change" in careful
    for row in rows(text):
        assert (Path("reports") / row.split("](")[1].split(")")[0]).is_file()


def test_a_sweep_is_a_table_fastest_first(here):
    cases = [
        Case(combo=name, enabled=(name,), effect=Effect(time=time))
        for name, time in (("vocos", 0.9), ("kv_cache", 0.7))
    ]
    reference("gpu/one_at_a_time-mini", *cases)
    text = write_index(Path("results"), Path("reports")).read_text()
    assert "### Sweep: [one_at_a_time-mini](reference/gpu/one_at_a_time-mini/report.md)" in text
    assert [row.split("`")[1] for row in rows(text)] == ["kv_cache", "vocos"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case(scored=False), "(incomplete)"),
        (Case(effect=Effect(audio=0.5)), "(failed)"),
        (Case(enabled=("vocos",), statuses={"vocos": ("inactive", "none pays")}), "(inactive)"),
        (Case(unmeasured="random weights speak noise"), "| not measured |"),
        (Case(texts=2, rounds=1, seeds=1), "no verdict"),
    ],
)
def test_what_takes_weight_from_a_figure_stands_beside_it(here, case, says):
    reference("gpu/production-mini", case)
    (row,) = rows(write_index(Path("results"), Path("reports")).read_text())
    assert says in row


def test_what_nobody_could_hear_says_what_was_computed(here):
    reference("gpu/production-random", Case(unmeasured="random weights speak noise"))
    folder = RunFolder.open(Path("results/reference/gpu/production-random"))
    near = {"kl_mean": {"mean": 0.0, "low": 0.0, "high": 0.0}}
    folder.write_json("fidelity.json", {"cases": [], "stages": {"generate_tokens": {"verdict": "", "figures": near}}})
    folder.write_summary(build_summary(folder))
    (row,) = rows(write_index(Path("results"), Path("reports")).read_text())
    assert "| computed: every stage is faithful |" in row


def test_energy_and_another_reference_are_shown_where_there_are_any(here):
    reference("gpu/production-mini", Case(memory_kind="vram"))
    folder = RunFolder.open(Path("results/reference/gpu/production-mini"))
    assert "energy" not in write_index(Path("results"), Path("reports")).read_text()
    summary = folder.summary()
    summary.comparison["energy_j_per_audio_s"] = replace(summary.comparison["peak_memory_mb"], value=0.25)
    summary.against = "campaign"
    summary.variants["campaign"] = summary.variants.pop("baseline")
    folder.write_summary(summary)
    text = write_index(Path("results"), Path("reports")).read_text()
    assert "| peak memory | energy | quality |" in text
    (row,) = rows(text)
    assert row.startswith("| [`production`](reference/gpu/production-mini/report.md) against `campaign` |")
    assert "| 0.250 (" in row


def test_results_and_reports_come_in_pairs(here):
    reference("gpu/production-mini", Case())
    Path("reports/reference/gpu/production-mini").rename("reports/reference/gpu/other-mini")
    with pytest.raises(UserError, match="has no report: `python -m harness report results/reference/gpu/production"):
        write_index(Path("results"), Path("reports"))
    shutil.rmtree("results/reference/gpu/production-mini")
    with pytest.raises(UserError, match="other-mini tells of results that are not in"):
        write_index(Path("results"), Path("reports"))


def test_a_report_over_several_results_has_their_names(here):
    for name in ("gpu/production-mini", "gpu/screening-mini"):
        reference(name, Case())
    Path("reports/reference/gpu/production-mini+screening-mini").mkdir()
    assert len(rows(write_index(Path("results"), Path("reports")).read_text())) == 2
    Path("reports/reference/gpu/production-mini+other-mini").mkdir()
    with pytest.raises(UserError, match="results that are not in results/reference/gpu/other-mini: remove it"):
        write_index(Path("results"), Path("reports"))


def test_nothing_measured_yet_is_an_index_too(here):
    Path("reports").mkdir()
    assert rows(write_index(Path("results"), Path("reports")).read_text()) == []


@pytest.mark.slow
def test_all_runs_are_on_one_page_with_links_and_filters(here):
    reference("gpu/production-mini", Case(effect=Effect(time=0.5)))
    single = make_run(Path("results"), Case(combo="a|b <i>", device="Other <CPU>"), minute=1)
    write_report([single], Path("reports") / single.run_id)
    sweep = [make_run(Path("results/20260314-sweep"), Case(combo=name), minute) for minute, name in enumerate("xy")]
    write_report(sweep, Path("reports/20260314-sweep"))
    unfinished = write_rows(Path("results"), Case(), minute=9)
    page = write_overview(Path("results"), Path("reports")).read_text()
    links = re.findall(r'<a href="([^"]+)">', page)
    assert len(links) == 4
    assert len(set(links)) == 3  # the sweep's runs share a report
    assert all((Path("reports") / link).is_file() for link in links)
    assert unfinished.run_id not in page
    assert "<option>Other &lt;CPU&gt;</option>" in page
    assert 'data-combo="a|b &lt;i&gt;"' in page


def test_a_page_over_no_runs_is_a_page(here):
    Path("reports").mkdir()
    assert "<tbody>" in write_overview(Path("results"), Path("reports")).read_text()
