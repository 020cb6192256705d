"""What a call takes with sets of optimizations on that no job measured: a Gaussian process for each stage.

A call's time is a sum of stages, and most optimizations act in one of them. In the sum everything depends on
everything: what halves a stage is worth much where the others are fast already, and little where they are not. In a
stage's own logarithm little does. So each stage is learnt by itself, and the times are added up afterwards,

    T(S)  =  sum over the stages of  base * exp(f(S) - f(nothing on))

**The process.** f is a Gaussian process over the sets (C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for
Machine Learning", MIT Press 2006) whose values are the more alike the fewer optimizations two sets differ in:

    cov(f(S), f(S'))  =  scale^2 * product of exp(-theta_i), over the i that are on in one of the two only

Each optimization has a relevance of its own, theta_i, so the jobs tell where it acts ("automatic relevance
determination": D. J. C. MacKay 1994, R. M. Neal 1996): 0 for what does nothing in this stage, which then takes no
measurements from the others. Relevant ones may interact, in twos, threes and more, the more the more relevant they
are. A job observes f(on) - f(off) with the variance (factor * error)^2 + sigma^2. Its own standard error is that of
the whole call, which a stage may well have more of or less, and partly it is what the texts differ by, which jobs that
speak the same texts share: hence the factor. sigma is what the jobs have in common, processes that differ for one.

**How sure.** theta, scale, factor and sigma maximize the likelihood of the jobs together with wide priors (most of
theta is small, a few are large). By themselves these values make the intervals too narrow, as if it were known that
what looks like nothing is nothing: of 20 made-up GPUs (`tests/test_surrogate.py`, three sweeps), the 95 % intervals
held the truth of 85 % for some parts, with what follows of 95 %. DRAWS of them are taken from the normal distribution
that the curvature gives (Laplace's approximation), those aside that the jobs contradict, and their answers are mixed.
What slows a job down slows all of its stages at once, so errors of one job are added up over stages as if they were one
and the same, where that is the wider.

**Whether it fits.** Each job can be told from the others and held against what it measured (`Surrogate.held_out`).

What it cannot know: an interaction of three or more that shows in none of the measured sets is expected to be as small
as the others are.

The logarithm of the sum is not linear in f; its error is carried on to first order. A figure that is no sum of stages
(memory, a word error rate) is one stage: its change is f itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import optimize, special

from harness.orders import ENUMERATED, Sums

LEAST = 1e-4
"""No job is known better than this: 0.01 per cent of a time, 0.0001 of a word error rate."""
DRAWS = 16
RELEVANCE = (-4.0, 3.0)
"""Mean and standard deviation of the prior of log theta: from 0.00004 to 7 is within two of them."""
CONTRADICTED = 0.95
"""Draws beyond this region of the normal distribution, by what the jobs say of them, are drawn again."""


@dataclass(frozen=True)
class Jobs:
    """`on`, `off` [jobs, names] of 0 and 1; `changes` [stages, jobs] from off to on, logarithms of times; `errors`
    [jobs], standard errors; `base` [stages]: with nothing on, each stage's share."""

    on: np.ndarray
    off: np.ndarray
    changes: np.ndarray
    errors: np.ndarray
    base: np.ndarray


@dataclass(frozen=True)
class Surrogate:
    """For each draw, the process of each stage."""

    draws: tuple[tuple["Process", ...], ...]
    base: np.ndarray

    def tell(self, sums: Sums, fewer: Sums | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Estimate and variance [sums] of the weighted sums of log T.

        `fewer` are the same sums over fewer sets: the variance is taken over these, where `sums` has too many.
        """
        estimates = np.array([sums.weights @ self._logs(draw, sums.sets)[0] for draw in self.draws])
        within = np.mean([self._variance(draw, fewer or sums) for draw in self.draws], axis=0)
        return estimates.mean(axis=0), within + estimates.var(axis=0)

    def held_out(self, job: int) -> tuple[float, float]:
        """What the other jobs make of one job's change: estimate and variance, of which its own noise is a part.

        The processes' parameters stay those that all jobs taught, this one among them.
        """
        others = Surrogate(tuple(tuple(process.without(job) for process in draw) for draw in self.draws), self.base)
        jobs = self.draws[0][0].jobs
        sets = np.stack([np.zeros_like(jobs.on[job]), jobs.on[job], jobs.off[job]])
        (estimate,), (variance,) = others.tell(Sums(sets, np.array([[0.0, 1.0, -1.0]])))
        own = [
            self._logs(without, sets)[1][:, 1] @ [math.sqrt(process.noise[job]) for process in draw]
            for draw, without in zip(self.draws, others.draws, strict=True)
        ]  # standard deviations: what slows a job down is the same in all of its stages
        return float(estimate), float(variance + np.mean(np.square(own)))

    def _logs(self, draw: Sequence["Process"], sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log T of the sets, [sets], and each stage's share of T, [stages, sets]."""
        means = np.stack([process.mean(sets) for process in draw])
        stages = means - means[:, :1] + np.log(self.base)[:, None]
        total = special.logsumexp(stages, axis=0)
        return total, np.exp(stages - total)

    def _variance(self, draw: Sequence["Process"], sums: Sums) -> np.ndarray:
        shares = self._logs(draw, sums.sets)[1]
        known = np.zeros(len(sums.weights))
        apart, together = np.zeros(()), np.zeros(())
        for process, share in zip(draw, shares, strict=True):
            weights = sums.weights * share
            weights[:, 0] -= weights.sum(axis=1)  # of f(S) - f(nothing on)
            prior, pull, noise = process.spread(sums.sets, weights)
            known = known + prior - pull
            apart, together = apart + noise**2, together + noise
        return np.maximum(known + np.maximum(together**2 - apart, 0).sum(axis=1), 0)


def learn(jobs: Jobs) -> Surrogate:
    rng = np.random.default_rng(0)
    stages = [_Likelihood(jobs, changes).draws(rng) for changes in jobs.changes]
    return Surrogate(tuple(zip(*stages, strict=True)), jobs.base)


@dataclass(frozen=True)
class Process:
    """A stage's process given the jobs, for one choice of its parameters."""

    jobs: Jobs
    changes: np.ndarray
    theta: np.ndarray
    scale: float
    factor: float
    sigma: float

    def without(self, job: int) -> "Process":
        """The same process, given the other jobs only."""
        jobs, rest = self.jobs, np.arange(len(self.changes)) != job
        others = Jobs(jobs.on[rest], jobs.off[rest], jobs.changes[:, rest], jobs.errors[rest], jobs.base)
        return replace(self, jobs=others, changes=self.changes[rest])

    @property
    def noise(self) -> np.ndarray:
        """Each job's variance, [jobs]."""
        return (self.factor * self.jobs.errors) ** 2 + self.sigma**2

    @cached_property
    def precision(self) -> np.ndarray:
        """The inverse covariance of the jobs' changes, [jobs, jobs]."""
        covariance = self._with_jobs(self.jobs.on) - self._with_jobs(self.jobs.off) + np.diag(self.noise)
        return np.linalg.inv(covariance)

    def mean(self, sets: np.ndarray) -> np.ndarray:
        """f of the sets, [sets]."""
        return self._with_jobs(sets) @ (self.precision @ self.changes)

    def spread(self, sets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of weighted sums of f: variance before the jobs [sums], what they take of it [sums], and what each job's
        noise leaves in the sum, in standard deviations with a sign [sums, jobs]."""
        seen = weights @ self._with_jobs(sets)
        gain = seen @ self.precision
        prior = (weights * self._smoothed(sets, weights)).sum(axis=1)
        return prior, (gain * seen).sum(axis=1), gain * np.sqrt(self.noise)

    def _with_jobs(self, sets: np.ndarray) -> np.ndarray:
        """Covariance of the sets' f with the jobs' changes, [sets, jobs]."""
        return self._kernel(sets, self.jobs.on) - self._kernel(sets, self.jobs.off)

    def _kernel(self, sets: np.ndarray, others: np.ndarray) -> np.ndarray:
        apart = (sets * self.theta) @ (1 - others).T + ((1 - sets) * self.theta) @ others.T
        return self.scale**2 * np.exp(-apart)

    def _smoothed(self, sets: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """weights [sums, sets] times the covariance of all sets with all sets.

        Over all sets that there are the covariance is a product of one 2 x 2 matrix for each name, and needs not be
        written out: 4096 sets have 17 million entries. Of a few sets it is.
        """
        n = sets.shape[1]
        if n > ENUMERATED or len(sets) ** 2 < 2**n:
            return weights @ self._kernel(sets, sets)
        place = sets.astype(int) @ (1 << np.arange(n)[::-1])
        cube = np.zeros((len(weights), 2**n))
        cube[:, place] = weights
        cube = cube.reshape(-1, *(2,) * n)
        for axis, likeness in enumerate(np.exp(-self.theta), start=1):
            cube = cube + likeness * np.flip(cube, axis)
        return self.scale**2 * cube.reshape(len(weights), -1)[:, place]


class _Likelihood:
    """How well a stage's parameters, logs of [theta of each name, scale, factor, sigma], explain its changes."""

    def __init__(self, jobs: Jobs, changes: np.ndarray) -> None:
        self.jobs, self.changes = jobs, changes
        count, names = jobs.on.shape
        sets, where = np.unique(np.concatenate([jobs.on, jobs.off]), axis=0, return_inverse=True)
        ones = np.eye(len(sets))[where.reshape(2, count)]
        self.contrast = ones[0] - ones[1]  # [jobs, sets]
        self.differs = (sets[:, None, :] != sets[None, :, :]).astype(float)  # [sets, sets, names]
        largest, error = max(float(np.abs(changes).max()), 10 * LEAST), float(np.median(jobs.errors))
        center, width = RELEVANCE
        self.prior = np.array([center] * names + [math.log(largest), 0.0, math.log(max(error / 3, largest / 1000))])
        self.width = np.array([width] * names + [1.0, 0.5, 1.0])

    def draws(self, rng: np.random.Generator) -> list[Process]:
        mode = self._mode()
        steps, best = self._steps(mode), self(mode)[0]
        furthest = best + special.chdtri(len(mode), 1 - CONTRADICTED) / 2
        found: list[np.ndarray] = []
        shrink = 1.0
        while len(found) < DRAWS:
            draw = mode + shrink * (steps @ rng.normal(size=len(mode)))
            if self(draw)[0] <= furthest:
                found.append(draw)
            else:
                shrink *= 0.98  # the closer to the mode, the surer to be taken
        return [self._process(draw) for draw in found]

    def _mode(self) -> np.ndarray:
        """The best of two searches: from where all are relevant, and from where none is."""
        found = []
        bounds = list(zip(self.prior - 5 * self.width, self.prior + 3 * self.width, strict=True))
        for start in (-2.0, -5.0):
            begin = self.prior.copy()
            begin[: self.jobs.on.shape[1]] = start
            found.append(optimize.minimize(self, begin, jac=True, method="L-BFGS-B", bounds=bounds))
        return min(found, key=lambda one: one.fun).x

    def _steps(self, mode: np.ndarray, size: float = 1e-3) -> np.ndarray:
        """A square root of the inverse curvature at the mode; no direction is wider than the prior."""
        ahead, behind = ([self(mode + sign * step)[1] for step in size * np.eye(len(mode))] for sign in (1, -1))
        curvature = (np.array(ahead) - np.array(behind)) / (2 * size)
        values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
        return vectors / np.sqrt(np.maximum(values, RELEVANCE[1] ** -2))

    def __call__(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        """-log of likelihood times prior, and its gradient (Rasmussen & Williams, equation 5.9)."""
        process = self._process(logs)
        theta = process.theta
        kernel = process.scale**2 * np.exp(-self.differs @ theta)
        covariance = self.contrast @ kernel @ self.contrast.T + np.diag(process.noise)
        factor = np.linalg.cholesky(covariance)
        half = np.linalg.inv(factor)
        explained = half.T @ (half @ self.changes)
        distance = (logs - self.prior) / self.width
        value = self.changes @ explained / 2 + np.log(np.diag(factor)).sum() + distance @ distance / 2
        pull = np.outer(explained, explained) - half.T @ half
        by_kernel = (self.contrast.T @ pull @ self.contrast) * kernel
        slopes = [
            *(theta * np.tensordot(by_kernel, self.differs, axes=2) / 2),
            -by_kernel.sum(),
            -np.diag(pull) @ (process.noise - process.sigma**2),
            -np.trace(pull) * process.sigma**2,
        ]
        return float(value), np.array(slopes) + distance / self.width

    def _process(self, logs: np.ndarray) -> Process:
        *theta, scale, factor, sigma = np.exp(logs)
        return Process(self.jobs, self.changes, np.array(theta), float(scale), float(factor), float(sigma))
