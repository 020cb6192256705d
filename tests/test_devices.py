"""A device for each timed job: leases on a host with several GPUs, what launchers are told, what is shown meanwhile."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness import board, devices
from harness.errors import UserError
from hydra_plugins.designs import give_devices, is_elsewhere


@pytest.fixture
def two_gpus(monkeypatch, own_locks):
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    monkeypatch.delenv(devices.VISIBLE, raising=False)


def test_two_jobs_get_a_gpu_each_and_a_third_waits(two_gpus):
    waited = []
    with devices.leased("cuda"):
        first = devices.visible_gpus()
        _as_in_another_process()
        with devices.leased("cuda"):
            assert {first[devices.VISIBLE], os.environ[devices.VISIBLE]} == {"0", "1"}
            _as_in_another_process()
            with pytest.raises(_WaitedError), devices.leased("cuda", _stop(waited)):
                pass
    assert waited == ["said"]


class _WaitedError(Exception):
    pass


def _stop(waited: list[str]):
    def on_wait():
        waited.append("said")
        raise _WaitedError

    return on_wait


def _as_in_another_process() -> None:
    os.environ.pop(devices.VISIBLE, None)


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """Says which threads are one physical core, as the kernel would."""
    monkeypatch.setattr(devices, "CORES", tmp_path / "cpu")

    def tell(threads: dict[int, str]) -> None:
        for core, told in threads.items():
            (folder := tmp_path / "cpu" / f"cpu{core}" / "topology").mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{told}\n")

    return tell


@pytest.mark.parametrize("told", [{3: "3,5", 5: "3,5"}, {4: "4-5", 5: "4-5"}])
def test_two_threads_of_one_core_go_to_one_job(own_locks, cores, told):
    cores(told)
    with devices.leased_core(list(told)) as first, devices.leased_core(list(told)) as second:
        assert first in told
        assert second is None


def test_a_core_is_one_jobs_alone(own_locks, cores):
    with devices.leased_core([3, 5]) as first:
        with devices.leased_core([3, 5]) as second, devices.leased_core([3, 5]) as none_left:
            assert {first, second} == {3, 5}
            assert none_left is None
        with devices.leased_core([3, 5]) as again:
            assert again == second


def test_afterwards_everything_is_visible_as_before(two_gpus, monkeypatch):
    monkeypatch.setenv(devices.VISIBLE, "4,7")
    with devices.leased("cuda"):
        assert os.environ[devices.VISIBLE] == "4"
    assert os.environ[devices.VISIBLE] == "4,7"


def test_a_gpu_that_the_command_names_is_not_another_one(two_gpus):
    with devices.leased("cuda:1"):
        assert devices.visible_gpus() == {}, "its number is right among all of them"
        with devices.leased("cuda"):
            assert devices.visible_gpus() == {devices.VISIBLE: "0"}


def test_on_the_cpu_there_is_one_at_a_time(own_locks):
    with devices.leased("cpu"), pytest.raises(_WaitedError), devices.leased("cpu", _stop([])):
        pass


def _hold_and_die(ready) -> None:
    lease = devices.leased("cpu")
    lease.__enter__()
    ready.set()
    os.kill(os.getpid(), 9)


def test_a_lease_ends_with_its_process_however_that_ends(own_locks):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_and_die, args=(ready,))
    process.start()
    assert ready.wait(10)
    process.join()
    with devices.leased("cpu", _stop([])):
        pass


JOBLIB = {"n_jobs": -1, "pre_dispatch": "2*n_jobs"}
RAY = {"ray": {"init": {"address": None}, "remote": {}}}
SLURM = {"gpus_per_node": None, "gres": None}


@pytest.mark.parametrize(
    ("asked", "device", "gpus", "jobs"),
    [
        (-1, "cuda", 4, 4),
        (2, "cuda", 4, 2),
        (8, "auto", 4, 4),
        (-1, "cuda:1", 4, 1),
        (-1, "cpu", 4, 1),
        (3, "auto", 0, 1),
    ],
)
def test_joblib_runs_as_many_jobs_at_once_as_there_are_devices(monkeypatch, asked, device, gpus, jobs):
    monkeypatch.setattr(devices, "count_gpus", lambda: gpus)
    launcher = OmegaConf.create(JOBLIB | {"n_jobs": asked})
    give_devices(launcher, device)
    assert launcher.n_jobs == jobs


def test_a_scheduler_is_asked_for_a_gpu_a_job(monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    ray, slurm = OmegaConf.create(RAY), OmegaConf.create(SLURM)
    give_devices(ray, "cuda")
    give_devices(slurm, "auto")
    assert ray.ray.remote.num_gpus == 1
    assert slurm.gpus_per_node == 1
    on_cpu = OmegaConf.create(RAY)
    give_devices(on_cpu, "cpu")
    assert "num_gpus" not in on_cpu.ray.remote
    with pytest.raises(UserError, match="say device=cuda"):
        give_devices(OmegaConf.create(RAY), "cuda:1")


def test_what_was_asked_of_a_scheduler_stays(monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    ray = OmegaConf.create({"ray": {"init": {}, "remote": {"num_gpus": 2}}})
    slurm = OmegaConf.create({"gpus_per_node": None, "gres": "gpu:h100:1"})
    give_devices(ray, "cuda")
    give_devices(slurm, "cuda")
    assert ray.ray.remote.num_gpus == 2
    assert slurm.gpus_per_node is None


def test_which_launchers_work_on_other_hosts():
    assert is_elsewhere(OmegaConf.create(SLURM))
    assert is_elsewhere(OmegaConf.create({"ray": {"init": {"address": "auto"}, "remote": {}}}))
    assert not any(is_elsewhere(OmegaConf.create(launcher)) for launcher in (RAY, JOBLIB, {}))


# -- the board ---------------------------------------------------------------------------------------------------------


def test_jobs_leave_how_far_they_are_and_that_they_ended(tmp_path):
    now = [0.0]
    with board.note(tmp_path, "k1", "production", lambda: now[0]) as show:
        show("speed pass, baseline", 3, 10)
        assert board.read(tmp_path) == {
            "k1": {"label": "production", "phase": "speed pass, baseline", "done": 3, "total": 10}
        }
    assert board.read(tmp_path)["k1"]["ended"]
    board.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_a_job_for_its_note(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with board.note(tmp_path, "k1", "production") as show:
        show("speed pass", 1, 2)


class Bar:
    """Rich's progress display, as lines by number."""

    def __init__(self):
        self.lines = {}

    def add_task(self, description, total=None, completed=0):
        self.lines[len(self.lines)] = {"description": description, "total": total, "completed": completed}
        return len(self.lines) - 1

    def update(self, line, **changes):
        self.lines[line] |= changes

    def remove_task(self, line):
        self.lines[line] = None


def test_the_board_has_a_line_for_each_job_that_is_measured_and_one_for_all():
    bar = Bar()
    draw = board._Drawing(bar, done=2, of=5)
    running = {"label": "a", "phase": "speed pass", "done": 4, "total": 9}
    draw({"k1": running, "k2": running | {"label": "b", "total": 0}})
    assert [line["description"] for line in bar.lines.values()] == ["jobs", "a: speed pass", "b: speed pass"]
    draw({"k1": {"label": "a", "ended": True}, "k2": running | {"label": "b"}})
    assert bar.lines[0]["completed"] == 3
    assert bar.lines[1] is None
    assert bar.lines[2]["completed"] == 4


@pytest.mark.parametrize(("n_gpus", "n_cores", "share"), [(1, 16, 16), (2, 32, 16), (8, 4, 1)])
def test_a_gpus_job_has_the_gpus_share_of_the_cores_whoever_starts_it(monkeypatch, n_gpus, n_cores, share):
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: n_gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(n_cores)))
    monkeypatch.setenv("MKL_NUM_THREADS", "50")  # as joblib says to its workers
    monkeypatch.setenv(devices.VISIBLE, "0")
    assert devices.share_of_cores("cuda:0") == share
    assert devices.share_of_cores("cpu") is None
