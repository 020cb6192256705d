"""Launchers that run a sweep's jobs in other processes, on the miniature: nothing is faked."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from harness import plan
from harness.results import find_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MEMBERS = ("inference_mode", "fused_vocoder")
BRIEF = [
    *("device=cpu", "workload.texts=['It was late.']", "workload.seeds=[1]", "quality.fidelity_texts=0"),
    *("measure.min_rounds=2", "measure.max_rounds=2", "measure.warmup_calls=0"),
]
SWEEP = ["+sweep=leave_one_out", *(f"optimizations.{name}.enabled=true" for name in MEMBERS), *BRIEF]


@pytest.fixture
def short_tmp():
    """Locks of its own, so that it waits for no other job of this machine; Ray's sockets need a short path."""
    folder = tempfile.mkdtemp(dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


AS_IF_OF_TWO = (
    "import sys; from harness import devices; devices.count_devices = lambda _: 2; "
    "import run_sweep; sys.exit(run_sweep.main())"
)
"""joblib runs as many jobs at once as there are devices; one at a time it runs in the command's own process."""


FAKES = [
    *("+sweep=leave_one_out", "optimizations.fake_fast.enabled=true", "optimizations.fake_together.enabled=true"),
    *("plugin_modules=[fakes]", "pipeline.loader=fakes.load", "pipeline.name=untrained", "device=cpu"),
    *("workload=smoke", "measure.min_rounds=40", "measure.max_rounds=40"),
]
"""Jobs of a few seconds, in which there is time to be killed."""


def start(tmp_path: Path, short_tmp: str, launcher: str, sweep: list[str]) -> subprocess.Popen:
    if not importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher"):
        pytest.skip(f"uv sync --extra {launcher}")
    folders = [f"results_dir={tmp_path / 'results'}", f"reports_dir={tmp_path / 'reports'}"]
    script = [sys.executable, "-c", AS_IF_OF_TWO, *sweep, f"hydra/launcher={launcher}", *folders]
    environment = os.environ | {"TMPDIR": short_tmp, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with (tmp_path / "output").open("a") as output:
        return subprocess.Popen(script, env=environment, stdout=output, stderr=output, cwd=tmp_path)


def ends_well(tmp_path: Path, process: subprocess.Popen) -> Path:
    """The sweep's folder, all of whose jobs are done."""
    code = process.wait(800)
    assert code == 0, (tmp_path / "output").read_text()[-4000:]
    (folder,) = (tmp_path / "results").iterdir()
    assert not plan.missing(folder)
    assert len(find_runs([folder])) == 1 + len(MEMBERS)
    return folder


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_launcher_runs_a_design(tmp_path, short_tmp, launcher):
    ends_well(tmp_path, start(tmp_path, short_tmp, launcher, SWEEP))
    assert len(list((tmp_path / "reports").glob("*/report.md"))) == 1
    if launcher == "joblib":
        assert "waits until no other job measures on cpu" in (tmp_path / "output").read_text()


def test_a_killed_worker_and_then_a_killed_parent_lose_only_what_was_being_measured(tmp_path, short_tmp):
    process = start(tmp_path, short_tmp, "joblib", FAKES)
    (folder,) = _until(lambda: list(tmp_path.glob("results/*")))
    _until(lambda: plan.done(folder))
    _until(lambda: _measuring(process)).kill()
    assert process.wait(120) == 1
    assert "The same command goes on with them." in (tmp_path / "output").read_text()
    kept = plan.done(folder)
    assert kept

    process = start(tmp_path, short_tmp, "joblib", FAKES)
    worker = _until(lambda: _measuring(process))
    process.send_signal(signal.SIGKILL)
    process.wait()
    _until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

    assert ends_well(tmp_path, start(tmp_path, short_tmp, "joblib", FAKES)) == folder
    assert all(plan.done(folder)[key] == run for key, run in kept.items()), "what was done is not measured again"


def _measuring(process: subprocess.Popen) -> psutil.Process | None:
    """The launcher's process that measures: it has a forkserver of its own, with children."""
    workers = [one for one in psutil.Process(process.pid).children() if "loky" in " ".join(one.cmdline())]
    return next((one for one in workers if any(child.children() for child in one.children())), None)


def _until(what, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found
