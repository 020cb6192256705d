"""Code that is named by its import path: loaders, and the optimizations of other people."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError

ENTRY_POINTS = "chatterbox_harness.optimizations"


def import_path(path: str) -> Any:
    """The object at `package.module.name`. Raises UserError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise _cannot_import(path, error) from None


def check_path(path: str) -> None:
    """Raises UserError where the source says, without being run, that there is nothing at `package.module.name`."""
    module, _, name = path.rpartition(".")
    try:
        spec = _spec(module)
    except ValueError as error:
        raise _cannot_import(path, error) from None
    if spec is None:
        raise _cannot_import(path, f"No module named {module!r}")
    source = _source(spec)
    if source and not re.search(rf"\b{re.escape(name)}\b", source.read_text(encoding="utf-8")):
        raise _cannot_import(path, f"module {module!r} has no attribute {name!r}")


def source_of(module: str) -> Path | None:
    """The file of a module, found without importing what it stands in; None for one that has none."""
    spec = _spec(module)
    return _source(spec) if spec else None


def _spec(module: str) -> ModuleSpec | None:
    package, *inner = module.split(".")
    spec = find_spec(package)
    if spec is None or not inner or spec.submodule_search_locations is None:
        return spec
    return PathFinder.find_spec(module, [str(Path(root, *inner[:-1])) for root in spec.submodule_search_locations])


def _source(spec: ModuleSpec) -> Path | None:
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _cannot_import(path: str, reason: object) -> UserError:
    return UserError(f"cannot import {path} ({reason}): check the name and the Python path")


def has_strangers(plugin_modules: Iterable[str] = ()) -> bool:
    """Whether other people's optimizations take part: named modules, or installed packages with entry points."""
    return bool(list(plugin_modules) or entry_points(group=ENTRY_POINTS))


def import_catalogue(plugin_modules: Iterable[str] = ()) -> ModuleType:
    """The package `optimizations`, after everybody's plugins have registered themselves in it.

    They come from installed packages, through their entry points, and from `plugin_modules`, import paths.
    Raises UserError for a module that cannot be imported.
    """
    catalogue = importlib.import_module("optimizations")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    for module in plugin_modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"plugin_modules: cannot import {module} ({error}); start where it can be imported from"
            ) from None
    return catalogue
