"""What each optimization of the catalogue declares, read from its source and not run.

A plugin's module imports PyTorch, transformers and chatterbox, which takes ten seconds; somebody who mistyped a name
should not wait for that. What a command has to know of a plugin stands in its class as plain values: its name, its
parameters with their types and ranges, the stages it replaces, the optimizations it requires. `read` collects them from
the files. What cannot be read that way, and what other people register, is imported: `declaration` says the same of a
class.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import settings
from harness.errors import UserError
from harness.settings import check_ranges, did_you_mean

PACKAGE = "optimizations"
TUPLES = ("replaces", "requires", "requires_on_gpu")
ONLY_ON_GPU = "only_on_gpu"


class UnreadableError(ValueError):
    """A declaration that only running the code can tell."""


@dataclass(frozen=True)
class Declaration:
    """One optimization as far as configuring it goes; `parameters` is a dataclass."""

    name: str
    parameters: Any
    replaces: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    requires_on_gpu: tuple[str, ...] = ()
    only_on_gpu: bool = False

    def requirements(self, gpu: bool) -> tuple[str, ...]:
        """What it cannot run without, on a GPU or on a CPU; what these require in turn is theirs."""
        return (*self.requires, *(self.requires_on_gpu if gpu else ()))

    @property
    def defaults(self) -> dict[str, Any]:
        return dataclasses.asdict(self.parameters())


Catalogue = Mapping[str, Declaration]
"""Declarations by name, in the order of application."""


def declaration(cls: Any) -> Declaration:
    """What a plugin's class declares, once it is imported."""
    replaces, requires, on_gpu = (tuple(getattr(cls, name)) for name in TUPLES)
    return Declaration(cls.name, cls.Config, replaces, requires, on_gpu, cls.only_on_gpu)


def imported(catalogue: ModuleType) -> dict[str, Declaration]:
    """The catalogue's declarations once the package is imported, with whatever registered itself in it."""
    return {name: declaration(cls) for name, cls in catalogue.CATALOGUE.items()}


# -- checking what was asked for -------------------------------------------------------------------------------------


def check_known(catalogue: Catalogue, name: str) -> None:
    """Raises UserError for an optimization that is not in the catalogue."""
    if name not in catalogue:
        near = did_you_mean(name, catalogue)
        raise UserError(f"unknown optimization {name!r}{near}; known: {', '.join(catalogue)}")


def check_parameter(declared: Declaration, name: str) -> None:
    """Raises UserError for a parameter that the optimization does not have."""
    known = list(declared.defaults)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"{declared.name} has no parameter {name!r}{did_you_mean(name, known)}; {has}")


def check_parameters(declared: Declaration, values: Mapping[str, Any]) -> None:
    """Raises UserError for a parameter that is unknown, of another type, or out of its range."""
    for name in values:
        check_parameter(declared, name)
    check_ranges(f"{PACKAGE}.{declared.name}", declared.parameters, values)


# -- reading the files -----------------------------------------------------------------------------------------------


@cache
def read() -> Catalogue:
    """The catalogue of this project, nothing of it imported. Raises UnreadableError."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UnreadableError(f"there is no package {PACKAGE}")
    init = Path(spec.origin)
    applied = dict(_constants(_parsed(init))).get("APPLIED")
    if not applied:
        raise UnreadableError(f"{init} names no order of application")
    declared = [_read_file(init.with_name(f"{name}.py")) for name in applied]
    return {one.name: one for one in declared}


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _constants(body: ast.Module | ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Names and values of the plain constants that a module or a class defines."""
    for statement in body.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if isinstance(target, ast.Name):
            try:
                yield target.id, ast.literal_eval(value)
            except ValueError:
                continue


def _read_file(path: Path) -> Declaration:
    """The one optimization that the file registers."""
    module = _parsed(path)
    registered = [
        statement
        for statement in module.body
        if isinstance(statement, ast.ClassDef) and "register" in map(ast.unparse, statement.decorator_list)
    ]
    if len(registered) != 1 or [ast.unparse(base) for base in registered[0].bases] != ["Optimization"]:
        raise UnreadableError(f"{path} does not register one subclass of Optimization")
    (cls,) = registered
    values = dict(_constants(cls))
    names = {target for target in ("name", *TUPLES, ONLY_ON_GPU) if _assigns(cls, target)}
    if "name" not in values or names - set(values):
        raise UnreadableError(f"{path} computes what it declares")
    parameters = _parameters(cls, dict(_constants(module)))
    replaces, requires, on_gpu = (tuple(values.get(name, ())) for name in TUPLES)
    return Declaration(values["name"], parameters, replaces, requires, on_gpu, bool(values.get(ONLY_ON_GPU)))


def _assigns(cls: ast.ClassDef, name: str) -> bool:
    targets = [ast.unparse(target) for one in cls.body if isinstance(one, ast.Assign) for target in one.targets]
    return name in targets


def _parameters(cls: ast.ClassDef, constants: dict[str, Any]) -> Any:
    """The dataclass of a plugin's parameters, without its methods, which may need what is not imported."""
    found = [one for one in cls.body if isinstance(one, ast.ClassDef) and one.name == "Config"]
    source = found[0] if found else ast.parse("@dataclass\nclass Config: ...").body[0]
    assert isinstance(source, ast.ClassDef)
    source.body = [one for one in source.body if isinstance(one, ast.AnnAssign)] or [ast.Pass()]
    scope = {**vars(settings), **constants}  # dataclass, field, number and the like, as the file itself imports them
    try:
        exec(compile(ast.fix_missing_locations(ast.Module([source], [])), "<parameters>", "exec"), scope)
    except Exception as error:
        raise UnreadableError(f"the parameters of {cls.name} cannot be read: {error}") from error
    return scope["Config"]
