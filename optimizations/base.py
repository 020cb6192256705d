"""What an optimization is, and the catalogue it registers itself in."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from harness.errors import UserError
from harness.pipeline import Pipeline
from harness.settings import check_ranges


@dataclass
class Evidence:
    """What a plugin shows, after a run, to prove that it was active; `reason` says why it was not."""

    active: bool
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


class Optimization:
    """One toggleable strategy that transforms the pipeline.

    The docstring of a subclass teaches: what the baseline does, what this changes, why it should help, where it
    cannot, what the campaign claimed, and how to read the evidence.
    """

    name: ClassVar[str]
    extra: ClassVar[bool] = False
    """True for what is not one of the campaign's twelve."""
    lossless: ClassVar[bool] = True
    """True where the tokens and, to rounding, the wave are the baseline's; False where quality has to be judged."""
    replaces: ClassVar[tuple[str, ...]] = ()
    """Stages that this plugin replaces outright; two plugins that replace the same one are refused."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Optimizations without which this one, or the main part of it, cannot run: `unavailable` names them then. They
    are registered before it. Designs switch them on with it, and switch it off with any of them."""
    requires_on_gpu: ClassVar[tuple[str, ...]] = ()
    """What it requires besides on a GPU."""
    only_on_gpu: ClassVar[bool] = False
    """True for what is unavailable on a CPU, whatever else is on: a screening there is of the others."""

    @dataclass
    class Config:
        """Parameters; they become `optimizations.<name>.*` on the command line.

        Types, and the limits that `number` and `choice` of `harness.settings` set, are checked before anything loads.
        """

    config: Any
    """An instance of the subclass's own Config."""

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()
        check_ranges(f"optimizations.{self.name}", type(self.config), vars(self.config))

    def environment(self) -> dict[str, str]:
        """Variables that the worker needs before CUDA starts."""
        return {}

    def unavailable(self, pipeline: Pipeline) -> str | None:
        """Why this cannot run here, in words a user can act on; None if it can."""
        return None

    def apply(self, pipeline: Pipeline) -> None:
        """Transform the pipeline through its undoable methods."""
        raise NotImplementedError

    def evidence(self, pipeline: Pipeline) -> Evidence:
        """After a run: was it active, and by which facts? Read from the pipeline, never from the config."""
        raise NotImplementedError


CATALOGUE: dict[str, type[Optimization]] = {}
"""Every registered optimization by name, in the order of application."""


def register(cls: type[Optimization]) -> type[Optimization]:
    """Add an optimization to the catalogue under its name.

    Raises UserError if the name is taken, or if it requires one that is not there before it.
    """
    taken = CATALOGUE.get(cls.name)
    if taken is not None and taken is not cls:
        raise UserError(
            f"two optimizations are called {cls.name!r}: {taken.__module__}.{taken.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}; rename yours"
        )
    before = [name for name in names() if name != cls.name]
    for name in (*cls.requires, *cls.requires_on_gpu):
        if name not in before:
            raise UserError(
                f"{cls.name} requires {name!r}, which is not registered before it{_did_you_mean(name, before)}; known: "
                f"{', '.join(before)}"
            )
    CATALOGUE[cls.name] = cls
    return cls


def names() -> list[str]:
    """The catalogue's names in the order of application."""
    return list(CATALOGUE)


def requirements(name: str, device: str = "auto") -> tuple[str, ...]:
    """What the named optimization requires on a device: cpu, cuda, cuda:N, or auto, a GPU where there is one.

    In the order of application; what these require in turn is theirs. Raises UserError for an unknown name.
    """
    cls = type(create(name))
    has_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    required = {*cls.requires, *(cls.requires_on_gpu if has_gpu else ())}
    return tuple(other for other in names() if other in required)


def create(name: str, params: dict[str, Any] | None = None) -> Optimization:
    """The named optimization with its parameters.

    Raises UserError for an unknown name or parameter, with the nearest known one.
    """
    if name not in CATALOGUE:
        raise UserError(f"unknown optimization {name!r}{_did_you_mean(name, names())}; known: {', '.join(names())}")
    cls = CATALOGUE[name]
    known = [f.name for f in fields(cls.Config)]
    for param in params or {}:
        if param not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{name} has no parameter {param!r}{_did_you_mean(param, known)}; {has}")
    return cls(cls.Config(**(params or {})))


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
