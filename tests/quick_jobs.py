"""`run_sweep.py` with jobs that take no time: `python tests/quick_jobs.py +sweep=... ` where a process has to die.

Each job writes down in $QUICK_JOBS/begun that it began. $QUICK_JOBS_DIE names one at which the process is killed, and
where: `within NAME` with half of its files written, `after NAME` when they are all there.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import factories
import yaml

from harness import sweep
from harness.config import JobSpec
from harness.results import RunFolder, Summary
from harness.summarize import build_summary


def run_job(spec: JobSpec, results: Path, part=None) -> Summary:
    """In place of `harness.sweep.run_job`: a run's folder, written at once."""
    with Path(os.environ["QUICK_JOBS"], "begun").open("a") as stream:
        stream.write(f"{spec.combo}\n")
    folder = _write(spec, results)
    death = os.environ.get("QUICK_JOBS_DIE")
    if death == f"within {spec.combo}":
        cut_last_line(folder.utterances_file)
        os.kill(os.getpid(), signal.SIGKILL)
    folder.write_summary(build_summary(folder))
    if death == f"after {spec.combo}":
        os.kill(os.getpid(), signal.SIGKILL)
    return folder.summary()


def _write(spec: JobSpec, results: Path) -> RunFolder:
    case = factories.Case(
        spec.combo, enabled=tuple(spec.toggles), against=spec.against, texts=1, rounds=2, seeds=1, sweep="leave_one_out"
    )
    folder = factories.write_rows(results, case)
    written = yaml.safe_load((folder.path / "job.yaml").read_text())
    folder.write_job(written | {"key": spec.config["key"]})
    return folder


def cut_last_line(path: Path) -> None:
    """As a crash leaves it."""
    content = path.read_bytes()
    path.write_bytes(content[:-40])


if __name__ == "__main__":
    import run_sweep

    sweep.run_job = run_job
    sys.exit(run_sweep.main())
