"""Triton kernels for T3's decode step, the engine that runs them, and `python -m optimizations.kernels` to time them.

Importing this package imports no Triton: a machine without it can still list the catalogue.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def for_device(name: str, device: torch.device) -> Any:
    """The named module of kernels, or None where the device is no GPU or there is no Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"optimizations.kernels.{name}")
