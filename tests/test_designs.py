"""What each design runs: whatever needs another never runs without it, and every question is asked in one job."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.designs import DESIGNS, MOST_SCREENED, Job, Subject
from harness.errors import UserError
from harness.results import BASELINE

KNOWN = tuple("abcdefghij")
CHAIN = Subject("x", ("a", "b", "c", "d"), KNOWN, requires={"c": ("b",), "d": ("b", "c")})
FREE = Subject("x", (), ("a", "b", "c"))


def asked(jobs: list[Job]) -> list[tuple[str, str]]:
    """Which optimizations are on, against which: "abd", "a"."""
    return [("".join(job.enabled), "".join(job.reference)) for job in jobs]


def test_alone_means_against_the_baseline_or_against_the_prerequisites():
    assert asked(DESIGNS["one_at_a_time"](FREE)) == [("a", ""), ("b", ""), ("c", "")]
    jobs = DESIGNS["one_at_a_time"](CHAIN)
    assert asked(jobs) == [("a", ""), ("b", ""), ("bc", "b"), ("bcd", "bc")]
    assert [job.against for job in jobs] == [BASELINE, BASELINE, "b", "b+c"]
    assert [job.group for job in jobs] == ["a", "b", "c", "d"]


def test_prerequisites_outside_the_combo_come_along():
    lonely = Subject("x", ("d",), KNOWN, requires=CHAIN.requires)
    assert asked(DESIGNS["one_at_a_time"](lonely)) == [("bcd", "bc")]


def test_leaving_out_takes_what_needs_it_along_and_then_tells_the_group_apart():
    jobs = DESIGNS["leave_one_out"](CHAIN)
    assert asked(jobs) == [
        ("abcd", ""),  # the combo itself, against the baseline
        ("bcd", "abcd"),
        ("a", "abcd"),  # b, c and d as a group,
        ("a", "ab"),  # b by itself,
        ("ab", "abcd"),  # c and d,
        ("ab", "abc"),  # c by itself,
        ("abc", "abcd"),  # and d
    ]
    assert [job.label for job in jobs[:3]] == ["x", "x-without-a", "x-without-b+c+d"]
    assert (jobs[3].label, jobs[3].against) == ("x-without-b+c+d", "x-without-c+d")


def test_leaving_out_needs_a_combo():
    with pytest.raises(UserError, match="combo=production"):
        DESIGNS["leave_one_out"](FREE)


def test_pairs_share_their_reference():
    assert asked(DESIGNS["pairs"](FREE)) == [("a", ""), ("b", ""), ("c", ""), ("ab", ""), ("ac", ""), ("bc", "")]
    jobs = asked(DESIGNS["pairs"](CHAIN))
    assert ("ab", "") in jobs
    assert {("abc", "b"), ("ab", "b"), ("bc", "b")} <= set(jobs)  # a x c, beside b
    assert not any({"b", "c"} <= set(enabled) - set(reference) for enabled, reference in jobs)  # c without b is nothing


def test_what_excludes_each_other_is_never_together():
    rivals = Subject("x", (), ("a", "b", "c"), exclusive=[frozenset("ab")])
    for name in ("pairs", "screening"):
        assert not any({"a", "b"} <= set(job.enabled) for job in DESIGNS[name](rivals))


def levels(jobs: list[Job], names: tuple[str, ...]) -> np.ndarray:
    """-1 and 1, [sets, names]: those of the jobs and the one with nothing on."""
    return np.array([[1 if name in job.enabled else -1 for name in names] for job in jobs] + [[-1] * len(names)])


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7, 8, 11, 12, 15, 16, 21, 26, 31])
def test_a_screening_is_balanced_and_of_few_runs(n):
    names = tuple(f"n{i}" for i in range(n))
    jobs = DESIGNS["screening"](Subject("x", names, names))
    assert len(jobs) <= 32
    assert len(jobs) >= min(2 * n, 2**n - 1, 32)
    assert jobs[0] == Job("x", names, group="screening")
    assert len({job.label for job in jobs}) == len({job.enabled for job in jobs}) == len(jobs)
    found = levels(jobs, names)
    correlations = found.T @ found / len(found) - np.eye(n)
    assert np.abs(correlations).max(initial=0) < (0.15 if n <= 8 else 0.3)
    assert np.abs(found.mean(axis=0)).max() < 0.2
    if 5 <= n <= 8:  # no main effect looks like an interaction of two
        for one, other in combinations(range(min(n, 6)), 2):
            assert np.abs(found.T @ (found[:, one] * found[:, other])).max() < 0.2 * len(found)


def seen_together(jobs: list[Job], names: tuple[str, ...], few: int) -> float:
    """How many of the combinations of any few of the names are there."""
    groups = [(levels(jobs, names)[:, group] > 0).tolist() for group in combinations(range(len(names)), few)]
    return float(np.mean([len(set(map(tuple, group))) for group in groups])) / 2**few


def test_a_screening_sees_any_few_in_most_of_their_combinations():
    names = tuple("abcdefghijk")
    screened = DESIGNS["screening"](Subject("x", names, names))
    assert seen_together(screened, names, 3) == 1
    assert seen_together(screened, names, 4) > 0.85
    rng = np.random.default_rng(0)
    by_chance = [Job("", tuple(name for name in names if rng.random() < 0.5)) for _ in screened]
    assert seen_together(screened, names, 5) > seen_together(by_chance, names, 5) > 0.5


def test_a_screening_may_have_more_runs_and_begins_with_the_same():
    names = tuple("abcdefghijk")
    subject = Subject("x", names, names, requires={"c": ("b",)}, exclusive=[frozenset("de")])
    usual, more = (DESIGNS["screening"](replace(subject, runs=runs)) for runs in (None, 48))
    assert (len(usual), len(more)) == (32, 48)
    assert more[:32] == usual
    assert all(subject.feasible(job.enabled) for job in more)
    fewer, least = (DESIGNS["screening"](replace(subject, runs=runs)) for runs in (3, 1))
    assert fewer == usual[: len(least)]
    few = Subject("x", ("a", "b"), KNOWN, runs=48)
    assert sorted(asked(DESIGNS["screening"](few))) == [("a", ""), ("ab", ""), ("b", "")]  # there are no more


def test_a_screening_beside_its_combo_pairs_all_but_the_combo_with_it():
    subject = Subject("x", tuple("abcdefghijk"), tuple("abcdefghijk"), requires={"c": ("b",)})
    usual, beside = (DESIGNS["screening"](replace(subject, beside_combo=choice)) for choice in (False, True))
    assert beside[0] == usual[0] == Job("x", subject.enabled, BASELINE, (), "screening")
    assert beside[1:] == [replace(job, against="x", reference=subject.enabled) for job in usual[1:]]


def test_a_screening_of_too_many_is_refused():
    names = tuple(f"n{i}" for i in range(MOST_SCREENED + 1))
    with pytest.raises(UserError, match="name a combo"):
        DESIGNS["screening"](Subject("x", (), names))


def test_a_screening_with_prerequisites_keeps_both_levels_of_each():
    names = tuple("abcdefghijkl")
    jobs = DESIGNS["screening"](Subject("x", names, names, requires={"c": ("b",), "d": ("b",), "f": ("e", "b")}))
    for name in names:
        share = sum(name in job.enabled for job in jobs) / len(jobs)
        assert 0.3 <= share <= 0.75


def test_a_factorial_crosses_a_few_beside_the_others():
    jobs = DESIGNS["factorial"](Subject("x", tuple("abc"), KNOWN, over=("b", "c")))
    assert asked(jobs) == [("a", ""), ("ac", "a"), ("ab", "a"), ("abc", "a")]
    assert [job.label for job in jobs] == ["x-without-b+c", "x-without-b", "x-without-c", "x"]
    assert {job.against for job in jobs[1:]} == {"x-without-b+c"}
    alone = DESIGNS["factorial"](Subject("x", (), KNOWN, over=("b", "c")))
    assert asked(alone) == [("c", ""), ("b", ""), ("bc", "")]


@pytest.mark.parametrize("over", [(), ("z",), tuple("abcdef"), ("b",)], ids=["none", "unknown", "many", "needed"])
def test_a_factorial_over_what_cannot_be_crossed_is_refused(over):
    subject = Subject("x", tuple("abcdef"), KNOWN, requires={"c": ("b",)}, over=over)
    with pytest.raises(UserError, match="over"):
        DESIGNS["factorial"](subject)


@st.composite
def subjects(draw) -> Subject:
    """Any combo, where anything may need anything that is applied before it."""
    names = KNOWN[: draw(st.integers(1, 8))]
    requires = {name: tuple(draw(st.sets(st.sampled_from(names[:i]), max_size=2))) for i, name in enumerate(names) if i}
    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    whole = Subject("x", names, names, requires).with_prerequisites(chosen)
    over = draw(st.sets(st.sampled_from(whole), max_size=3))
    over = Subject("x", whole, names, requires).with_dependents(over)
    return Subject("x", whole, names, requires, over=over)


@pytest.mark.parametrize("design", DESIGNS)
@settings(max_examples=60, deadline=None)
@given(subject=subjects())
def test_nothing_ever_runs_without_what_it_needs(design, subject):
    if design == "factorial" and not 1 <= len(subject.over) <= 5:
        return
    jobs = DESIGNS[design](subject)
    assert len(set(jobs)) == len(jobs)
    configurations: dict[str, set] = {}
    for job in jobs:
        assert job.enabled != job.reference
        for names, label in ((job.enabled, job.label), (job.reference, job.against)):
            assert list(names) == [name for name in subject.known if name in names]
            assert all(set(subject.requires.get(name, ())) <= set(names) for name in names)
            configurations.setdefault(label, set()).add(names)
    assert all(len(found) == 1 for found in configurations.values()), "one name, one configuration"
