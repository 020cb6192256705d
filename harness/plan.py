"""A sweep's plan: which jobs it has, which of them are measured, and where it goes on.

A sweep is a folder, `results/<date>-<time>-<design>/`. Its plan, `sweep.json`, is written before anything is measured;
each job leaves a run's folder beside it, whose `job.yaml` holds the job's key. Nothing else is kept of what is done: a
job is done when the folder with its key has a summary, which is written last, that says ok. So a sweep that was ended
in whichever way, and is started again by the same command, measures what is missing and nothing twice.

A key stands for everything that a job's figures depend on and that a command decides: configuration, code, packages'
versions, and the contents of checkpoint, reference clips and files. Other code is another sweep.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig

from harness import hub, preflight
from harness.clips import is_clip
from harness.config import JobSpec, expand, explain
from harness.console import in_words, say
from harness.errors import UserError
from harness.later import awaits_scores
from harness.plugins import source_of
from harness.results import FAILURES, RunFolder, is_run, write_atomically
from harness.workload import file_of

FILE = "sweep.json"
LOCK = ".sweep.lock"
JOBS_LOCK = ".jobs.lock"
CODE = Path(__file__).resolve().parent.parent
SOURCES = ("harness/**/*.py", "optimizations/**/*.py", "optimizations/**/*.cpp", "optimizations/**/*.cu")
PACKAGES = ("chatterbox-tts", "torch", "torchaudio", "transformers", "diffusers", "numpy", "bitsandbytes")
WATCH_S = 0.5
LOADING_S = 40.0
"""What the packages and two miniature models take to load on two cores; only to announce how long a job may take."""


@dataclass(frozen=True)
class Planned:
    """One job of a sweep: its key, what it measures, how it was asked for, and how long it may take [s]."""

    key: str
    label: str
    against: str
    enabled: tuple[str, ...]
    reference: tuple[str, ...]
    overrides: tuple[str, ...]
    expected_s: float

    def launched(self, folder: Path, number: int, of: int, on_board: bool) -> list[str]:
        """The overrides that tell a process which job it is, of which sweep, and who asked for it.

        Its folder is named by its whole path, as a launcher may start the process in another one.
        """
        job = {name: getattr(self, name) for name in ("key", "label", "against", "enabled", "reference")}
        job |= {"number": number, "of": of, "on_board": on_board}
        job |= {"host": socket.gethostname(), "process": os.getpid()}
        return [*self.overrides, f"job={_hydra(job)}", f"hydra.sweep.dir={_hydra(str(folder.resolve()))}"]


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# -- planning --------------------------------------------------------------------------------------------------------


def jobs_of(
    compose: Callable[[list[str]], DictConfig], choices: Sequence[list[str]], here: bool = True
) -> tuple[list[Planned], list[tuple[str, str]]]:
    """The jobs of each choice of overrides, each once; and of choices that are refused, what they are called and why.

    They are measured `here`, or on hosts that may have other devices. Raises UserError where all of them are refused.
    """
    jobs: dict[str, Planned] = {}
    refused = []
    for overrides in choices:
        try:
            specs = expand(compose(overrides))
            for warning in preflight.look(specs[0].config, here):
                say(f"Note: {warning}.")
        except (UserError, HydraException) as error:
            words = str(error) if isinstance(error, UserError) else explain(error)
            refused.append((" ".join(overrides), words))
            continue
        for spec in specs:
            planned = _planned(spec, overrides)
            jobs.setdefault(planned.key, planned)
    if not jobs:
        raise UserError(refused[0][1])
    return list(jobs.values()), refused


def _planned(spec: JobSpec, overrides: Sequence[str]) -> Planned:
    enabled, reference = tuple(spec.toggles), tuple(spec.against_toggles)
    return Planned(key(spec), spec.combo, spec.against, enabled, reference, tuple(overrides), expected_s(spec))


def expected_s(spec: JobSpec) -> float:
    """Roughly, where speech is made in real time."""
    return LOADING_S + 2 * spec.config["measure"]["budget_s"]


# -- keys ------------------------------------------------------------------------------------------------------------


def key(spec: JobSpec) -> str:
    """What a job's figures depend on, as far as a command decides it."""
    parts = (spec.combo, spec.toggles, spec.against, spec.against_toggles, spec.own_config, code(), _contents(spec))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code() -> str:
    """The fingerprint of this project's sources and of the packages below them."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in CODE.glob(pattern)):
        digest.update(f"{path.relative_to(CODE)}\0".encode() + path.read_bytes())
    for package in PACKAGES:
        try:
            digest.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()[:16]


def _contents(spec: JobSpec) -> dict[str, str | None]:
    """Fingerprints of what a configuration only names: checkpoint, clips, texts, other people's plugins, files."""
    pipeline, workload = spec.config["pipeline"], spec.config["workload"]
    files = [Path(voice) for voice in workload["voices"] if is_clip(voice)]
    files += [file_of(workload["file"])] if workload["file"] else []
    files += [source for name in spec.config["plugin_modules"] if (source := source_of(name))]
    for parameters in (*spec.toggles.values(), *spec.against_toggles.values()):
        files += [Path(one) for one in parameters.values() if isinstance(one, str) and Path(one).is_file()]
    return {str(path): _sha256(path) for path in files} | {"checkpoint": _checkpoint(pipeline)}


def _checkpoint(pipeline: Mapping[str, Any]) -> str | None:
    if pipeline["checkpoint_dir"]:
        return _folder(Path(pipeline["checkpoint_dir"]))
    if pipeline["name"] in hub.CHECKPOINTS:
        return hub.revision(pipeline["name"])
    return _folder(preflight.MINI_VOICES.parent) if pipeline["name"].startswith("mini") else None


@cache
def _folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- the folder ------------------------------------------------------------------------------------------------------


def folder_for(jobs: Sequence[Planned], results: Path, named: Path | None, name: str) -> Path:
    """The folder that a sweep measures into: the one it names, else that of the same plan where it is unfinished, else
    a new one.

    Raises UserError for a folder that holds another sweep.
    """
    keys = {job.key for job in jobs}
    if named is not None:
        if (planned := keys_of(named)) and planned != keys:
            raise UserError(
                f"{named} holds another sweep, or the same one of other code or settings: name another folder, or "
                "leave hydra.sweep.dir out"
            )
        return named
    unfinished = [file.parent for file in results.glob(f"*/{FILE}") if keys_of(file.parent) == keys]
    unfinished = [folder for folder in sorted(unfinished) if not keys <= done(folder).keys()]
    return unfinished[-1] if unfinished else _new(results / f"{datetime.now():%Y%m%d-%H%M%S}-{name}")


def _new(folder: Path) -> Path:
    number, name = 1, folder.name
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def keys_of(folder: Path) -> set[str]:
    """The keys of a folder's plan; none where there is no plan that can be read."""
    return {job["key"] for job in _read(folder)}


def _read(folder: Path) -> list[dict[str, Any]]:
    try:
        jobs = json.loads((folder / FILE).read_text(encoding="utf-8"))["jobs"]
        return [{"key": job["key"], "label": job["label"]} for job in jobs]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(folder: Path, jobs: Sequence[Planned]) -> None:
    """Leave the plan in its folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"jobs": [asdict(job) for job in jobs]}
    write_atomically(folder / FILE, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder for as long as a sweep measures into it, or until its process ends, however it does.

    Raises UserError where another sweep does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another sweep measures into {folder} right now: wait for its end, or name another folder, as in "
                "hydra.sweep.dir=results/mine"
            ) from None
        yield


@contextmanager
def taking_part(job: DictConfig | None, folder: Path) -> Iterator[bool]:
    """Whether a job is still to be measured; while it is, whoever goes on with its sweep waits for its end.

    A process that a launcher started ends with the one that asked for it: whoever killed that one wants no more. True
    for a job of no sweep.
    """
    if job is None:
        yield True
        return
    if job.host == socket.gethostname() and job.process != os.getpid():
        _end_with(job.process)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOBS_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield not any(key == job.key and _is_done(run) for key, run in _runs(folder))


def wait_for_leftovers(folder: Path) -> None:
    """Wait until no job is measured any more that an ended sweep has left behind."""
    with (folder / JOBS_LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for jobs of an earlier command that are still measured into {folder}.")
            fcntl.flock(lock, fcntl.LOCK_EX)


@cache
def _end_with(process: int) -> None:
    """End this process soon after another one, and with it all that it has started."""

    def watch() -> None:
        while psutil.pid_exists(process):
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prints(job: DictConfig | None) -> bool:
    """Whether a job may write to the terminal: not from another process than the one that draws a board there."""
    return job is None or not job.on_board or job.process == os.getpid()


def done(folder: Path) -> dict[str, Path]:
    """The folders of finished jobs by their keys."""
    return {key: run for key, run in _runs(folder) if _is_done(run)}


def _is_done(run: Path) -> bool:
    """Whether a run came to its end, which seals it, measured everything and is as it was then."""
    folder = RunFolder(run)
    try:
        summary = folder.summary()
        whole = summary.status == "ok" or (summary.status == "incomplete" and awaits_scores(folder))
        return whole and bool(summary.files)
    except UserError:  # no summary, or one that is damaged
        return False


def missing(folder: Path) -> list[str]:
    """What the jobs of a folder's plan are called that are not measured to their end; none where there is no plan."""
    finished = done(folder)
    return [job["label"] for job in _read(folder) if job["key"] not in finished]


def clear_leftovers(folder: Path, jobs: Sequence[Planned]) -> None:
    """Remove what jobs left that did not finish: they are measured again. Other runs stay as they are."""
    keys = {job.key for job in jobs}
    for key, run in list(_runs(folder)):
        if key in keys and not _is_done(run):
            shutil.rmtree(run)
    (folder / FAILURES).unlink(missing_ok=True)


def _runs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Key and folder of each run of a sweep."""
    for run in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_run(run) and (key := key_of(run)):
            yield key, run


def key_of(run: Path) -> str | None:
    """The key of the job that a run's folder is from; None for a run of no sweep."""
    try:
        job = yaml.load((run / "job.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
        return job["key"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


# -- words -----------------------------------------------------------------------------------------------------------


def opening_line(folder: Path, jobs: Sequence[Planned], finished: Mapping[str, Path]) -> str:
    """What a sweep is about to do; `finished` are the folders of the jobs that are done, by their keys."""
    skipped = [job.label for job in jobs if job.key in finished]
    goes_on = f" Measured already, and skipped: {', '.join(skipped)}." if skipped else ""
    return f"Sweep of {len(jobs)} jobs into {folder}.{goes_on} {_to_go(jobs, finished)}."


def lines(folder: Path, jobs: Sequence[Planned]) -> list[str]:
    """What a sweep would do: a line for each job, and how long it may take in all."""
    finished = done(folder)
    took_s = _typical_s(finished)
    each = [
        f"{number:3} {'done ' if job.key in finished else 'to do'} {job.label} against {job.against}"
        + ("" if job.key in finished else f", about {in_words(took_s or job.expected_s)}")
        for number, job in enumerate(jobs, start=1)
    ]
    n_done = sum(job.key in finished for job in jobs)
    return [*each, f"{len(jobs)} jobs, {n_done} of them done; {_to_go(jobs, finished)}. Folder: {folder}"]


def _to_go(jobs: Sequence[Planned], finished: Mapping[str, Path]) -> str:
    took_s = _typical_s(finished)
    return f"about {in_words(math.fsum(took_s or job.expected_s for job in jobs if job.key not in finished))} to go"


def _typical_s(finished: Mapping[str, Path]) -> float | None:
    """What a finished job took on average; None where none is."""
    took = [seconds for run in finished.values() if (seconds := RunFolder(run).summary().timing.get("job_s"))]
    return math.fsum(took) / len(took) if took else None
