"""What the report says of parts: waterfalls that add up, groups, and the front."""

import math
import re

import pytest
from factories import TWELVE, Case, Effect, make_run

from harness.designs import DESIGNS, Subject
from harness.report import write_report

NAMES = TWELVE[:3]
LOGS = dict(zip(NAMES, (-0.6, -0.2, 0.0), strict=True))
REQUIRES = {NAMES[1]: (NAMES[0],)}


def effect(on) -> Effect:
    return Effect(time=math.exp(sum(LOGS[name] for name in on)), memory=1.2 - 0.1 * len(on))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report over a combo's leave-one-out and factorial."""
    folder = tmp_path_factory.mktemp("sweep")
    subject = Subject("trio", NAMES, TWELVE, REQUIRES, over=NAMES)
    jobs = dict.fromkeys(job for design in ("leave_one_out", "factorial") for job in DESIGNS[design](subject))
    runs = [
        make_run(
            folder,
            Case(
                combo=job.label,
                enabled=job.enabled,
                effect=effect(job.enabled),
                against=job.against,
                reference=job.reference,
                reference_effect=effect(job.reference),
                requires={name: list(needs) for name, needs in REQUIRES.items()},
                seed=number,
                texts=6,
            ),
            number,
        )
        for number, job in enumerate(jobs)
    ]
    return write_report(runs, folder / "report").parent


def test_a_waterfall_is_told_and_drawn(report):
    text = (report / "report.md").read_text()
    assert "## Which part carries it" in text
    assert "Shapley" in text
    assert "Holm" in text
    assert "within the measured interval" in text
    assert "| remainder |" in text
    assert f"| `{NAMES[2]}` |" in text.split("smallest findable |")[1]
    assert list(report.glob("waterfall-rtf-*.png"))
    assert f"{NAMES[0]} carries the most" in text
    assert re.search(r"not told from none by these jobs\. Of half of them a change of [\d.]+ % would", text)


def test_two_sets_of_parameters_are_two_waterfalls_that_say_which_and_what_they_leave_out(tmp_path):
    subject, runs = Subject("pair", NAMES[:2], TWELVE, {}, over=NAMES[:2]), []
    for size in (32, 64):
        for job in DESIGNS["factorial"](subject):
            case = Case(
                combo=job.label,
                enabled=job.enabled,
                effect=effect(job.enabled),
                parameters={NAMES[0]: {"size": size}},
                commit=f"c{size}",
                seed=len(runs),
                texts=6,
            )
            runs.append(make_run(tmp_path, case, len(runs)))
    text = write_report(runs, tmp_path / "report").read_text()
    for size in (32, 64):
        section = text.split(f"### `pair` with `{NAMES[0]}.size` {size}: time")[1].split("###")[0]
        assert f"Of others, 2 jobs are left out, where `{NAMES[0]}.size` had another value." in section
        assert "The jobs are of 2 commits" in section


def test_what_a_screenings_sets_go_without_is_told(tmp_path):
    on = {"trio": NAMES, "trio-screening-1": NAMES[1:], "trio-screening-2": NAMES[1:2]}
    runs = [
        make_run(tmp_path, Case(combo=name, enabled=names, effect=effect(names), sweep="screening"), minute)
        for minute, (name, names) in enumerate(on.items())
    ]
    text = write_report(runs, tmp_path / "report").read_text()
    table = text.split("goes without</summary>")[1].split("</details>")[0]
    assert f"| `trio-screening-1` | `{NAMES[0]}` |\n| `trio-screening-2` | `{NAMES[0]}`, `{NAMES[2]}` |" in table
    assert "`trio`" not in table


def test_what_left_together_is_told_as_a_group(report):
    text = (report / "report.md").read_text()
    assert "What had to be left out together" in text
    assert f"- `{NAMES[0]}` and `{NAMES[1]}`" in text


@pytest.mark.slow
def test_the_front_is_drawn(tmp_path):
    effects = {"quick": Effect(0.3, memory=1.5), "small": Effect(0.7, memory=0.5), "neither": Effect(0.8, memory=1.6)}
    runs = [make_run(tmp_path, Case(combo=name, effect=effect), i) for i, (name, effect) in enumerate(effects.items())]
    report = write_report(runs, tmp_path / "report").parent
    assert (report / "pareto.png").is_file()
    assert "Of 3 combos 2 are bettered by none" in (report / "report.md").read_text()


def test_a_single_run_has_no_such_section(tmp_path):
    text = write_report([make_run(tmp_path, Case())], tmp_path / "report").read_text()
    assert "Which part carries it" not in text
