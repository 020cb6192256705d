"""The report's warnings: each oddity once, however many runs have it, and nothing lost."""

from dataclasses import replace

import pytest
from factories import Case, make_run

from harness.report.data import Run
from harness.report.oddities import as_one, warnings


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Run:
    folder = make_run(tmp_path_factory.mktemp("run"), Case())
    return Run(folder.summary(), job={}, environment={}, path=folder.path)


@pytest.fixture
def told(a_run):
    """The items of the section over runs that are given as name and warnings."""

    def items(*runs: tuple[str, list[str]]) -> list[str]:
        made = [replace(a_run, summary=replace(a_run.summary, combo=name, warnings=found)) for name, found in runs]
        (block,) = warnings(made, []).blocks
        return block.items

    return items


def test_what_many_have_with_other_figures_is_one_sentence_with_their_span(told):
    spreads = (9, 45, 21, 11)
    runs = [(f"part-{spread}", [f"part-{spread}: calls spread by {spread}%, 1.5 at most."]) for spread in spreads]
    assert told(*runs) == ["4 combos: calls spread by 9 to 45%, 1.5 at most."]


def test_what_many_say_of_the_same_one_names_it_and_counts_the_runs(told):
    runs = [(f"part-{number}", ["production: it cannot speak."]) for number in range(5)]
    assert told(*runs) == ["production: it cannot speak. (5 runs)"]


def test_few_are_named_each_with_its_figures(told):
    runs = [(f"part-{spread}", [f"part-{spread}: calls spread by {spread}%.", "no sound."]) for spread in (9, 45)]
    assert told(*runs) == [
        "part-9: calls spread by 9%. (`part-9`)",
        "part-45: calls spread by 45%. (`part-45`)",
        "no sound. (`part-9` and `part-45`)",
    ]


def test_a_single_run_needs_no_name_behind_its_warnings(told):
    assert told(("alone", ["alone: no sound."])) == ["alone: no sound."]


@pytest.mark.parametrize(
    ("texts", "one"),
    [
        (["1,024 of 2,048 rows", "96 of 2,048 rows"], "96 to 1,024 of 2,048 rows"),
        (["a WER of 0.1", "a WER of 0.05", "a WER of −0.2"], "a WER of −0.2 to 0.1"),
        (["none", "none"], "none"),
    ],
)
def test_figures_keep_how_they_were_written(texts, one):
    assert as_one(texts) == one


def test_numbers_in_names_are_no_figures(told):
    runs = [("alone", [f"voice-{number} of bf16 spoke {number} times" for number in range(4)])]
    assert len(told(*runs)) == 4
