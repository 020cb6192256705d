"""GPUs as the driver tells of them, without PyTorch and without touching CUDA."""

from __future__ import annotations

import ctypes
import os
from itertools import takewhile


def has_gpu(device: str) -> bool:
    """Whether a device, as a command names it, is a GPU: auto is one where there is one."""
    return count_gpus() != 0 if device == "auto" else device.startswith("cuda")


def count_gpus() -> int | None:
    """How many GPUs CUDA may use here, at most, as the driver says; None where it cannot be asked."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return None if _has_driver() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    named = takewhile(lambda one: one.strip() and not one.strip().startswith("-"), visible.split(","))
    return min(count, len(list(named)))  # CUDA stops at the first one that is none


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
