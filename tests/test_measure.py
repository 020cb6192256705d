"""Clocks, memory and the device's state, on the CPU; the GPU's part where there is one."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from harness import devices, measure

CPU = torch.device("cpu")


def test_a_call_is_timed_and_its_result_kept():
    result, seconds = measure.timed(CPU, lambda: time.sleep(0.05) or "done")
    assert result == "done"
    assert 0.05 <= seconds < 1


def test_what_a_helper_has_used_stays_counted_when_it_has_ended():
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as helper:
        meter = measure.CpuMeter(os.getpid())
        meter.refresh()
        assert helper.stdout is not None
        helper.stdout.readline()
        before = meter.helpers_s()
        helper.communicate(b"\n")
    after = meter.helpers_s()
    assert before is not None
    assert after is not None
    assert before > 0.25
    assert after > before - 0.05


def resident(n_bytes: int) -> mmap.mmap:
    """Fresh pages, all touched: an allocator might hand out memory that the process holds already."""
    block = mmap.mmap(-1, n_bytes)
    block[:: mmap.PAGESIZE] = bytes(-(-n_bytes // mmap.PAGESIZE))
    return block


def test_the_peak_is_seen_although_the_memory_is_free_again():
    measure.reset_peak(CPU)
    before = measure.peak(CPU).peak_mb
    resident(25_000_000).close()
    found = measure.peak(CPU)
    assert found.kind == "rss"
    assert found.peak_mb - before == pytest.approx(25, abs=5)


def test_a_new_peak_starts_from_what_is_held_now():
    block = resident(50_000_000)
    high = measure.peak(CPU).peak_mb
    block.close()
    measure.reset_peak(CPU)
    assert measure.peak(CPU).peak_mb < high - 40


def test_held_memory_counts_what_lives():
    before = measure.held_mb(CPU)
    block = resident(50_000_000)
    assert measure.held_mb(CPU) - before == pytest.approx(50, abs=5)
    block.close()


STEADY = {"sm_clock_mhz": 1980, "temperature_c": 40, "throttled": [], "n_processes": 2}


def test_a_steady_gpu_gives_no_warning():
    assert measure.state_warnings([STEADY, STEADY], n_own=2) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sm_clock_mhz": 1200}, "between 1200 and 1980 MHz"),
        ({"throttled": ["temperature"], "temperature_c": 91}, "throttled (temperature; up to 91 °C)"),
        ({"n_processes": 3}, "1 other process held the GPU"),
        ({"foreign_share": 0.4}, "other programs used 40% of the CPU while measuring (40% to 40% in a round)"),
    ],
)
def test_what_speaks_against_the_figures_is_said(change, words):
    (warning,) = measure.state_warnings([STEADY, STEADY | change], n_own=2)
    assert words in warning


def test_a_cpu_has_no_state_to_warn_about():
    assert measure.state_warnings([measure.device_state(CPU)], n_own=2) == []


def _burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_foreign_work_is_told_from_our_own():
    process = multiprocessing.get_context("fork").Process(target=_burn, args=(3.0,))
    process.start()
    as_own, as_foreign = measure.CpuWatch([process.pid]), measure.CpuWatch([])
    time.sleep(2.0)
    difference = as_foreign.foreign_share() - as_own.foreign_share()
    process.join()
    assert difference > 0.02, "a busy process counts as foreign unless it is one of ours"


def test_the_watch_says_nothing_of_a_process_that_ended():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    process.start()
    watch = measure.CpuWatch([process.pid])
    process.join()
    assert watch.foreign_share() == 0


def _hold(device: str, taken, release) -> None:
    with devices.leased(device):
        taken.set()
        release.wait(10)


def test_two_jobs_never_share_a_device(own_locks):
    context = multiprocessing.get_context("fork")
    taken, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=("cuda", taken, release))
    first.start()
    assert taken.wait(10)
    second_taken = context.Event()
    second = context.Process(target=_hold, args=("cuda:0", second_taken, release))
    second.start()
    assert not second_taken.wait(0.5), "cuda and cuda:0 are one device"
    with devices.leased("cuda:1"):
        pass
    release.set()
    assert second_taken.wait(10)
    first.join()
    second.join()


@pytest.mark.gpu
def test_vram_is_counted_by_the_allocator_and_seen_by_the_driver():
    device = torch.device("cuda")
    measure.reset_peak(device)
    before = measure.peak(device).peak_mb
    block = torch.ones(100_000_000 // 4, device=device)
    del block
    found = measure.peak(device)
    assert found.kind == "vram"
    assert found.peak_mb - before == pytest.approx(100, abs=1)
    assert found.detail["reserved_mb"] >= 100
    assert measure.device_state(device)["temperature_c"] > 0


@pytest.mark.parametrize(
    ("visible", "device", "part"),
    [
        (None, "cuda", "cuda0"),
        ("", "cuda:1", "cuda1"),
        ("1", "cuda", "cuda1"),
        ("2,3", "cuda:1", "cuda3"),
        ("GPU-5f", "cuda:0", "cudaGPU-5f"),
        ("1", "cpu", "cpu"),
    ],
)
def test_jobs_wait_for_each_other_on_one_gpu_and_not_on_two(monkeypatch, visible, device, part):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.machine_part(device) == part
