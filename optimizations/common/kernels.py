"""Modules of Triton kernels, imported where they can run: a machine without Triton can still list the catalogue."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def for_device(module: str, device: torch.device) -> Any:
    """The module at that import path, or None where the device is no GPU or there is no Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(module)
