"""Clocks, memory and the state of the device: what is read, and when it may be trusted.

    time      a host clock between two synchronizations of the device
    memory    the peak of one call, under its kind's name: "vram" is what PyTorch allocated on the GPU,
              "rss" what the operating system kept resident for the process; the two are never compared
    state     clocks, temperature, throttling and foreign programs, read between calls, told as warnings

Nothing here changes what is measured: no cache is emptied, no clock is locked.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

MB = 1e6
BUSY_SHARE = 0.10
"""Foreign programs that use more than this share of the CPU are worth a warning."""
CLOCK_DROP = 0.10
"""A GPU clock that falls by more than this share during the passes is worth a warning."""

_THROTTLING = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "temperature",
    "HwThermalSlowdown": "temperature",
    "HwPowerBrakeSlowdown": "power brake",
}

_PROC = Path("/proc")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size ("high water mark") to the current one


# -- time -------------------------------------------------------------------------------------------------------------


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result and its wall-clock seconds, the device's queue empty at both ends."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Moment:
    """A moment on the way of the device through its work; on a CPU, which does it at once, of the clock.

    Nobody waits for it, so what is between two of them takes as long as if nobody had looked.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        """Seconds; both have to be over."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """A peak in MB (10^6 bytes). `kind` is "vram" or "rss"; `detail` holds what else the system tells."""

    kind: str
    peak_mb: float
    detail: dict[str, float] = field(default_factory=dict)


def memory_kind(device: torch.device) -> str:
    return "vram" if device.type == "cuda" else "rss"


def reset_peak(device: torch.device, pid: int | None = None) -> None:
    """Start a new peak, on a CPU the process's of that id. Without Linux's `clear_refs`, that is its peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (_PROC / str(pid or os.getpid()) / "clear_refs").write_text(_RESET_PEAK)
    except OSError:  # another system, or a process that has ended, which its next answer tells
        return


def peak(device: torch.device, pid: int | None = None) -> Memory:
    """The peak since `reset_peak`. Raises psutil.Error for a process that has ended."""
    if device.type == "cuda":
        detail = {
            "allocated_mb": torch.cuda.max_memory_allocated(device) / MB,
            "reserved_mb": torch.cuda.max_memory_reserved(device) / MB,
        }
        # what the driver books for this process: weights, caches, fragments and the CUDA context itself
        process_mb = gpu.process_mb(os.getpid()) if (gpu := _gpu(device)) else None
        return Memory("vram", detail["allocated_mb"], detail | ({"process_mb": process_mb} if process_mb else {}))
    current_mb = psutil.Process(pid).memory_info().rss / MB
    return Memory("rss", _peak_rss_mb(pid) or current_mb, {"current_mb": current_mb})


def _peak_rss_mb(pid: int | None) -> float | None:
    """The high water mark of a process; of another process None, where the system does not tell."""
    status = _PROC / str(pid or os.getpid()) / "status"
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024 / MB if "VmHWM" in fields else None
    if pid not in (None, os.getpid()):
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def allocated_mb(device: torch.device) -> float:
    """What PyTorch holds on a GPU now."""
    return torch.cuda.memory_allocated(device) / MB


# -- what a process holds and does, seen from outside --------------------------------------------------------------


def hooks(model: Any) -> int:
    """Forward hooks on all modules of a model, whose parts are attributes of an object that may be no module."""
    parts = [model, *vars(model).values()] if hasattr(model, "__dict__") else []
    modules = {id(module): module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules()}
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values())


def holdings(pid: int) -> dict[str, float]:
    """Resident memory, threads and open files of a process; empty where the system does not tell."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            files = float(process.num_fds()) if hasattr(process, "num_fds") else 0.0
            return {"memory_mb": process.memory_info().rss / MB, "threads": process.num_threads(), "files": files}
    except (psutil.Error, OSError):
        return {}


class CpuMeter:
    """CPU seconds of a process, its helpers included, by the kernel's account, which no process can alter.

    `helpers` are its threads but the first, and the processes that it started. Reading takes microseconds; new
    processes are looked for by `refresh` only, which takes milliseconds. What one has used that has ended stays
    counted: seconds never grow fewer. None where the system does not tell.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._others: dict[int, float] = {}

    def refresh(self) -> None:
        with suppress(psutil.Error):
            for child in psutil.Process(self._pid).children(recursive=True):
                self._others.setdefault(child.pid, 0.0)

    def total_s(self) -> float | None:
        own = _cpu_s(self._pid)
        for pid, before in self._others.items():
            self._others[pid] = max(before, _cpu_s(pid) or 0.0)
        return None if own is None else own + sum(self._others.values())

    def helpers_s(self) -> float | None:
        total, first = self.total_s(), self._first_thread_s()
        return None if total is None or first is None else total - first

    def _first_thread_s(self) -> float | None:
        try:
            spent, *_ = (_PROC / f"{self._pid}/task/{self._pid}/schedstat").read_text().split()
        except (OSError, ValueError):
            return None
        return int(spent) / 1e9


def _cpu_s(pid: int) -> float | None:
    """By Linux's clock of a process, whose id is made of the process's (clock_getcpuclockid(3))."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it has ended
        return None


def held_mb(device: torch.device) -> float:
    """Memory in use now, garbage collected: the model's, when read before and after it is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / MB
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # freed weights (quantized away, say) go back to the system before we look
    return psutil.Process().memory_info().rss / MB


# -- the device's state -----------------------------------------------------------------------------------------------


def device_state(device: torch.device) -> dict[str, Any]:
    """Clocks [MHz], temperature [°C], throttle reasons and processes on a GPU; nothing on a CPU."""
    gpu = _gpu(device) if device.type == "cuda" else None
    return gpu.state() if gpu else {}


def state_warnings(states: list[dict[str, Any]], n_own: int) -> list[str]:
    """What the readings of one device say against the figures, in plain words; `n_own` processes on a GPU are ours.

    `foreign_share` is what other programs used of the CPU in a round.
    """
    shares = [state["foreign_share"] for state in states if "foreign_share" in state]
    if shares and (mean := sum(shares) / len(shares)) >= BUSY_SHARE:
        return [
            f"other programs used {mean:.0%} of the CPU while measuring ({min(shares):.0%} to {max(shares):.0%} in "
            "a round): close them and measure again"
        ]
    states = [state for state in states if "sm_clock_mhz" in state or "n_processes" in state]
    if not states:
        return []
    warnings = []
    clocks = [state["sm_clock_mhz"] for state in states if state.get("sm_clock_mhz")]
    if clocks and min(clocks) < (1 - CLOCK_DROP) * max(clocks):
        warnings.append(
            f"the GPU's clock moved between {min(clocks)} and {max(clocks)} MHz while measuring: "
            "compare ratios, not absolute times"
        )
    throttled = sorted({reason for state in states for reason in state.get("throttled", [])})
    if throttled:
        hottest = max(state.get("temperature_c", 0) for state in states)
        warnings.append(f"the GPU was throttled ({', '.join(throttled)}; up to {hottest} °C)")
    others = max(state.get("n_processes", 0) for state in states) - n_own
    if others > 0:
        warnings.append(f"{others} other process{'es' * (others > 1)} held the GPU while measuring")
    return warnings


class CpuWatch:
    """How much of the CPU programs other than ours used over a span of time."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._start = time.monotonic(), self._busy(), self._own()

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # already inside user and nice
        return sum(times) - idle - guest

    def _own(self) -> float:
        seconds = 0.0
        for pid in self._pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:  # it died; what it used is not foreign, so nothing may be concluded
                return float("inf")
            seconds += times.user + times.system
        return seconds

    def foreign_share(self) -> float:
        """Share of all cores used by others since the start, 0 where it cannot be told."""
        start, busy, own = self._start
        elapsed = time.monotonic() - start
        used = (self._busy() - busy) - (self._own() - own)
        return max(0.0, used / (elapsed * (os.cpu_count() or 1))) if elapsed > 0 else 0.0


@functools.cache
def _gpu(device: torch.device) -> _Gpu | None:
    """NVIDIA's management library for one device, initialized once; None where the driver does not answer."""
    return _Gpu.named(gpu_uuid(device) or "")


def gpu_uuid(device: torch.device) -> str | None:
    """The name by which NVIDIA's management library knows a GPU; None for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


class EnergyMeter:
    """What a GPU has used, by its own counter, whoever asked for it. Needs no CUDA, so the experiment reads it."""

    def __init__(self, uuid: str | None) -> None:
        self._gpu = _Gpu.named(uuid) if uuid else None

    def total_j(self) -> float | None:
        """Joules since the driver was loaded; None where nothing counts them."""
        return self._gpu.energy_j() if self._gpu else None


class _Gpu:
    """One GPU, asked through NVML; a question that this GPU or this container does not answer gives None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def named(cls, uuid: str) -> _Gpu | None:
        import pynvml

        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            return None

    def _ask(self, question: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def process_mb(self, pid: int) -> float | None:
        for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or []:
            if process.pid == pid and process.usedGpuMemory:
                return process.usedGpuMemory / MB
        return None

    def energy_j(self) -> float | None:
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def state(self) -> dict[str, Any]:
        nvml = self._nvml
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        state = {
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "throttled": sorted(
                {
                    words
                    for name, words in _THROTTLING.items()
                    if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
                }
            ),
            "n_processes": None if processes is None else len(processes),
        }
        return {name: value for name, value in state.items() if value is not None}
