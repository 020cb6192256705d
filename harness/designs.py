"""What to run, so that the runs can say which optimization did what.

A design turns a combo into jobs. Each pairs one set of optimizations with another, in one job and so on the same
device at the same time: two ratios of two jobs, one divided by the other, would carry the noise of both.

    one_at_a_time    each alone, with its prerequisites, against its prerequisites
    leave_one_out    the combo without each of its members, against the combo
    pairs            each two together, beside each of the two alone: do their effects multiply, or overlap
    screening        every member on and off at once, in 16 to 32 runs or more: main effects, interactions of two
    factorial        all combinations of a few members, named in `over`: everything about these few

**Prerequisites.** An optimization may need others: `cuda_graphs` captures what `kv_cache` has made static. Where they
are off it cannot run, and a job that switches it on all the same measures something else than it says. So no design
has a job in which something is on without what it needs. Leaving one out leaves out what needs it, as one group; two
more kinds of job tell the members of the group apart: each that nothing needs is left out by itself, and each that
others need is left out of the combo that these have left already.

Designs are pure: names in, jobs out. Names come in the order of application and stay in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.results import BASELINE

if TYPE_CHECKING:
    import numpy as np

Names = tuple[str, ...]

FULL = 4
"""Up to so many optimizations, a screening runs all their combinations."""
FRACTIONS = {5: "a b c d abcd", 6: "a b c d e abcde", 7: "a b c d bcd acd abd", 8: "a b c d bcd acd abd abc"}
"""For so many, a fraction of all combinations, 16 or 32, that keeps main effects clear of interactions of two; up to
six, these clear of each other, too."""
RUNS = 32
"""Of more members, a screening is completed to so many runs."""
JOBS_A_MEMBER = 2
"""Fewer jobs than so many for each member tell no waterfall (`harness.attribution`)."""
MOST_SCREENED = 31
MOST_CROSSED = 5
"""Of a factorial: 32 combinations."""


@dataclass(frozen=True)
class Job:
    """One paired experiment: `enabled` under the name `label`, against `reference` under the name `against`.

    `group` is what the job is about: an optimization, two of them as "a x b", or the design's name.
    """

    label: str
    enabled: Names
    against: str = BASELINE
    reference: Names = ()
    group: str = ""


@dataclass(frozen=True)
class Subject:
    """What a design is made for: a combo's name and its optimizations, and what is known of all optimizations.

    `requires` maps a name to those that it cannot run without; `exclusive` holds pairs that cannot be on together.
    `over` names the optimizations that a factorial varies. Of a screening, `runs` is how many jobs it has at least, if
    asked for, and `beside_combo` whether each is paired with the combo instead of with the baseline.
    """

    combo: str
    enabled: Names
    known: Names
    requires: Mapping[str, Collection[str]] = field(default_factory=dict)
    exclusive: Collection[frozenset[str]] = ()
    over: Names = ()
    runs: int | None = None
    beside_combo: bool = False

    @property
    def members(self) -> Names:
        """The combo's optimizations, or all where no combo is named."""
        return self.enabled or self.known

    def ordered(self, names: Collection[str]) -> Names:
        """In the order of application."""
        return tuple(name for name in self.known if name in names)

    def with_prerequisites(self, names: Iterable[str]) -> Names:
        """The names and everything that they need, directly or not."""
        return self.ordered(closure(names, lambda name: self.requires.get(name, ())))

    def with_dependents(self, names: Iterable[str]) -> Names:
        """The names and every member that needs them, directly or not."""
        return self.ordered(
            closure(names, lambda name: [other for other in self.members if name in self.requires.get(other, ())])
        )

    def needs(self, name: str) -> frozenset[str]:
        """What it cannot run without, of the members."""
        return frozenset(self.requires.get(name, ())).intersection(self.members)

    def feasible(self, names: Collection[str]) -> bool:
        """Whether everything that is on has what it needs, as far as the combo has it, and nothing excludes another."""
        lacking = any(not self.needs(name) <= set(names) for name in names)
        return not lacking and not any(pair <= set(names) for pair in self.exclusive)

    def without(self, names: Collection[str]) -> tuple[str, Names]:
        """Name and optimizations of the combo without some of its members."""
        if not names:
            return self.combo, self.enabled
        left_out = "+".join(self.ordered(names))
        return f"{self.combo}-without-{left_out}", tuple(name for name in self.enabled if name not in names)


Design = Callable[[Subject], list[Job]]


def closure(names: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> set[str]:
    """Everything that can be reached from the names, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += neighbours(name)
    return found


def single(subject: Subject) -> list[Job]:
    """Without a design: the combo against the baseline."""
    return [Job(subject.combo if subject.enabled else BASELINE, subject.enabled, group=subject.combo)]


def one_at_a_time(subject: Subject) -> list[Job]:
    """Each member with its prerequisites, against its prerequisites."""
    return [_beside(subject, (name,), name) for name in subject.members]


def leave_one_out(subject: Subject) -> list[Job]:
    """The combo, and against it the combo without each member and what needs it; where more than the one member left,
    also that one by itself, against the combo that what needs it has left already.

    Raises UserError for a combo with nothing to leave out.
    """
    _require_combo(subject, "leave_one_out")
    combo, enabled = subject.combo, subject.enabled
    jobs = [Job(combo, enabled, group=combo)]
    for name in enabled:
        group = subject.with_dependents([name])
        label, rest = subject.without(group)
        jobs.append(Job(label, rest, combo, enabled, group=name))
        if len(group) > 1:
            dependents = tuple(other for other in group if other != name)
            jobs.append(Job(label, rest, *subject.without(dependents), group=name))
    return jobs


def pairs(subject: Subject) -> list[Job]:
    """Every two members together and each of the two alone, all against the same: what the two need.

    A pair in which one needs the other has no "one without the other", and a pair that excludes each other no "both".
    """
    jobs = dict.fromkeys(one_at_a_time(subject))
    for one, other in combinations(subject.members, 2):
        both = subject.with_prerequisites([one, other])
        nested = one in subject.with_prerequisites([other]) or other in subject.with_prerequisites([one])
        if nested or not subject.feasible(both):
            continue
        needed = tuple(name for name in both if name not in (one, other))
        for names, group in (((one,), one), ((other,), other), ((one, other), f"{one} x {other}")):
            jobs[_beside(subject, names, group, needed)] = None
    return list(jobs)


def _beside(subject: Subject, names: Names, group: str, needed: Names = ()) -> Job:
    """The names on top of their prerequisites and of what else is named."""
    enabled = subject.with_prerequisites([*names, *needed])
    reference = tuple(name for name in enabled if name not in names)
    return Job("+".join(enabled), enabled, "+".join(reference) or BASELINE, reference, group)


def screening(subject: Subject) -> list[Job]:
    """Members on and off in a two-level design, each run against the baseline, or against the combo.

    Up to FULL members, all combinations; up to eight, a fraction of them in which main effects are clear of
    interactions of two. Up to MOST_SCREENED, a Plackett-Burman design and, up to RUNS, sets in which any few members
    are seen in further combinations (`harness.covering`). The subject's `runs` asks for more of these, so that the
    parts of many members are told apart. The combo itself is always there, against the baseline, which is everything
    off.

    Rows that no pipeline can be are repaired: what lacks a prerequisite is switched off, or the prerequisite is
    switched on, whichever leaves the levels of the rows until then nearer to half and half. Of two that exclude each
    other, the later one goes. Rows that became equal are run once.

    Raises UserError for more members than that.
    """
    members = subject.members
    if len(members) > MOST_SCREENED:
        raise UserError(
            f"sweep=screening takes {MOST_SCREENED} optimizations at most, not {len(members)}: name a combo"
        )
    rows = dict.fromkeys([_repaired(subject, members, switch_on=False)])
    for levels in _two_levels(len(members)):
        names = [name for name, level in zip(members, levels, strict=True) if level > 0]
        repairs = [_repaired(subject, names, switch_on) for switch_on in (False, True)]
        rows[min(repairs, key=lambda row: _imbalance(members, [*rows, row]))] = None
    rows.pop((), None)
    runs = subject.runs or (RUNS if len(members) > max(FRACTIONS) else JOBS_A_MEMBER * len(members))
    rows |= dict.fromkeys(_completing(subject, list(rows), runs - len(rows)))
    reference = (subject.combo, subject.enabled) if subject.beside_combo else (BASELINE, ())
    return [
        Job(subject.combo, row, group="screening")
        if row == subject.enabled
        else Job(f"{subject.combo}-screening-{number}", row, *reference, group="screening")
        for number, row in enumerate(rows)
    ]


def _completing(subject: Subject, rows: Sequence[Names], count: int) -> list[Names]:
    """So many sets beside these."""
    from harness.covering import covering  # numpy, likewise

    members = subject.members
    needs = {name: subject.needs(name) for name in members}
    beside = covering(members, needs, [frozenset(row) for row in rows], count, subject.feasible)
    return [subject.ordered(names) for names in beside]


def _imbalance(members: Names, rows: Collection[Names]) -> int:
    """How far the members are from being on in half of the rows: 0 where all are."""
    return sum((2 * sum(name in row for row in rows) - len(rows)) ** 2 for name in members)


def _two_levels(n: int) -> np.ndarray:
    """Runs [runs, n] of -1 and 1."""
    import numpy as np
    import pyDOE3  # a second that only a screening has to spend

    if n <= FULL:
        return np.asarray(pyDOE3.ff2n(n))
    if n in FRACTIONS:
        return np.asarray(pyDOE3.fracfact(FRACTIONS[n]))
    columns = 28 if 24 <= n < 28 else n  # pyDOE3 knows no Plackett-Burman design of 28 runs
    return np.asarray(pyDOE3.pbdesign(columns))[:, :n]


def _repaired(subject: Subject, names: Collection[str], switch_on: bool) -> Names:
    """The members named, changed as little as it takes to run together."""
    on = closure(names, subject.needs) if switch_on else set(names)
    for pair in subject.exclusive:
        on -= {subject.ordered(pair)[-1]} if pair <= on else set()
    while lacking := {name for name in on if not subject.needs(name) <= on}:
        on -= lacking
    return subject.ordered(on)


def factorial(subject: Subject) -> list[Job]:
    """All combinations of the optimizations in `over`, beside the combo's others, against these others alone.

    Combinations that no pipeline can be are left out. Raises UserError where `over` is empty, too long, names what is
    not there, or leaves out what needs one of them.
    """
    over = subject.ordered(subject.over)
    _check_crossed(subject)
    beside = tuple(name for name in subject.enabled if name not in over)
    jobs = []
    for off in (names for size in range(len(over), -1, -1) for names in combinations(over, size)):
        on = tuple(name for name in over if name not in off)
        enabled = subject.ordered({*beside, *on})
        if subject.feasible(enabled):
            label = subject.without(off)[0] if subject.enabled else "+".join(on)
            jobs.append(Job(label, enabled, group="factorial"))
    reference, *others = jobs
    if not beside:
        return others
    return [reference, *(replace(job, against=reference.label, reference=beside) for job in others)]


def _check_crossed(subject: Subject) -> None:
    over, where = subject.over, f"the combo {subject.combo}" if subject.enabled else "the catalogue"
    for name in over:
        if name not in subject.members:
            raise UserError(f"over: {name!r} is not in {where}: {', '.join(subject.members)}")
    if not 1 <= len(over) <= MOST_CROSSED:
        raise UserError(
            f"sweep=factorial crosses 1 to {MOST_CROSSED} optimizations, not {len(over)}: "
            "name them, as in over=[kv_cache,compile,cuda_graphs]"
        )
    if subject.enabled and (more := [name for name in subject.with_dependents(over) if name not in over]):
        raise UserError(f"over: {', '.join(more)} cannot run without {', '.join(over)}: add what you mean to cross")


def _require_combo(subject: Subject, design: str) -> None:
    if not subject.enabled:
        raise UserError(f"+sweep={design} leaves out of a combo: add +combo=production, or another one")


DESIGNS: dict[str, Design] = {
    "one_at_a_time": one_at_a_time,
    "leave_one_out": leave_one_out,
    "pairs": pairs,
    "screening": screening,
    "factorial": factorial,
}
