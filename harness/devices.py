"""Devices, without PyTorch and without touching CUDA: how many there are, and one for each timed job.

Launchers run jobs side by side, and two timed jobs on one device would measure each other. So a job takes a lease: a
lock on a file for each GPU, and one for the CPU, which ends with the process that holds it, however that ends. Beside a
GPU it takes one for a core as well, turn by turn.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO

LOCKS = Path(tempfile.gettempdir())
CORES = Path("/sys/devices/system/cpu")
VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_AGAIN_S = 0.2


# -- how many --------------------------------------------------------------------------------------------------------


def has_gpu(device: str) -> bool:
    """Whether a device, as a command names it, is a GPU: auto is one where there is one."""
    return count_gpus() != 0 if device == "auto" else device.startswith("cuda")


def waits_for_its_host(device: str) -> bool:
    """Whether one thread of the host launches all that a device computes: a CPU computes with all threads alike."""
    return device.startswith("cuda")


def count_devices(device: str) -> int:
    """How many jobs may be timed at once where a command names the device so."""
    return max(1, count_gpus() or 1) if device in ("auto", "cuda") and has_gpu(device) else 1


def count_gpus() -> int | None:
    """How many GPUs CUDA may use here, at most, as the driver says; None where it cannot be asked."""
    count, visible = _gpus_of_the_host(), _visible()
    return count if count is None or visible is None else min(count, len(visible))


def _gpus_of_the_host() -> int | None:
    """Also those that CUDA_VISIBLE_DEVICES hides; None where there is a driver that cannot be asked."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None if _has_driver() else 0


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def share_of_cores(device: str) -> int | None:
    """How many of the host's cores a job may use beside its GPU, one GPU's share; None on a CPU: that job has them all.

    Launchers give the processes that they start other numbers of threads than one that runs job after job: without
    this, a ratio would depend on who started the job.
    """
    if not waits_for_its_host(device):
        return None
    return max(1, len(os.sched_getaffinity(0)) // (_gpus_of_the_host() or 1))


def _visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; CUDA stops at the first entry that is none. None: it is not set."""
    if (named := os.environ.get(VISIBLE)) is None:
        return None
    entries = (entry.strip() for entry in named.split(","))
    return list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))


# -- one for each job ------------------------------------------------------------------------------------------------


@contextmanager
def leased(device: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a device against this harness's other jobs, or wait for one: cpu, cuda:N, or cuda for any GPU.

    Of several GPUs, only the one that is free is visible from then on, as cuda:0: to this process, whose CUDA must not
    have started, and to all that are given `visible_gpus`. `on_wait` is called once, if none is free.
    """
    while not (taken := _free(device)):
        on_wait()
        on_wait = lambda: None  # noqa: E731  # said once
        time.sleep(LOOK_AGAIN_S)
    lock, gpu = taken
    before = os.environ.get(VISIBLE)
    try:
        if gpu is not None:
            os.environ[VISIBLE] = gpu
        yield
    finally:
        lock.close()
        if gpu is not None:
            os.environ.pop(VISIBLE, None)
            os.environ.update({} if before is None else {VISIBLE: before})


@contextmanager
def leased_core(cores: Sequence[int]) -> Iterator[int | None]:
    """Hold one of these cores, by chance, against this harness's other jobs; None where they hold all.

    Cores that are threads of one physical core are held together, for they share what it computes with.
    """
    for core in random.sample(cores, len(cores)):
        if lock := _locked(f"core{_physical(core)}"):
            with lock:
                yield core
            return
    yield None


def _physical(core: int) -> int:
    """The first of the threads that share this one's physical core; itself where the kernel does not tell."""
    try:
        threads = (CORES / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return core
    return int(re.split("[,-]", threads)[0])


def visible_gpus() -> dict[str, str]:
    """The variable that shows another process the GPUs that this one sees: its forkserver may be older than a lease."""
    return {VISIBLE: os.environ[VISIBLE]} if VISIBLE in os.environ else {}


def see(gpus: dict[str, str]) -> None:
    """Make another process's `visible_gpus` this one's, too."""
    os.environ.update(gpus)


def _free(device: str) -> tuple[IO[str], str | None] | None:
    """The lock on a device that nobody holds, and the GPU to be shown where there are others, too."""
    for part, gpu in _candidates(device):
        if lock := _locked(part):
            return lock, gpu
    return None


def _locked(part: str) -> IO[str] | None:
    """The lock on a part of the machine; None if somebody holds it."""
    lock = (LOCKS / f"chatterbox-harness-{os.getuid()}-{part}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _candidates(device: str) -> list[tuple[str, str | None]]:
    """The parts of the machine that would do, and for each the GPU to be shown."""
    if device != "cuda" or (count := count_gpus() or 1) == 1:
        return [(machine_part(device), None)]
    return [(_gpu(one), one) for one in _visible() or map(str, range(count))]


def machine_part(device: str) -> str:
    """Which part of the machine a device is; under CUDA_VISIBLE_DEVICES two processes' `cuda:0` may be two GPUs.

    >>> machine_part("cpu")
    'cpu'
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return kind
    index, visible = int(number or 0), _visible() or []
    return _gpu(visible[index] if index < len(visible) else str(index))


def _gpu(named: str) -> str:
    """A GPU by its own name: two containers may both call theirs number 0."""
    import pynvml

    try:
        pynvml.nvmlInit()
        by_number = named.isdigit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(named)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(named)
        return str(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return f"cuda{named}"
