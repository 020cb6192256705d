"""Code that is named by its import path: loaders, and the optimizations of other people."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
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
        raise UserError(f"cannot import {path} ({error}): check the name and the Python path") from None


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
