"""One variant's process, from both ends of its pipe.

`Worker` is the parent's end: it starts the process, asks, waits no longer than a limit, and turns a child
that raises, hangs or dies into a `ChildError` that says how. `serve` is the child's end: it holds a
`Variant`, one pipeline with its optimizations, and answers until the pipe closes.

Children come from a forkserver that has imported the heavy packages once and has not touched CUDA. Each is a
fresh process with its own environment variables, set before its CUDA starts, so that nothing a plugin changes
can leak into the reference beside it.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import psutil

from harness.errors import UserError
from harness.fitting import fit
from harness.plugins import import_catalogue, import_path
from harness.results import slug

PRELOADED = ["harness.preload"]
IMPORTS_S = time.time() - psutil.Process().create_time()
"""From this process's start to here. `preload` imports this module last, and its children inherit the figure: what
a process of their own would have spent on importing the packages."""
SILENCE_DBFS = -60.0
TRACE_MARGIN_S = 2.0
"""A child writes where it hangs this long before the parent ends it."""
LOG_TAIL_LINES = 40


@dataclass(frozen=True)
class Setup:
    """All that a child needs to become one variant. `plugins` maps names to parameters, enabled ones only."""

    variant: str
    folder: Path
    loader: str
    loader_arguments: dict[str, Any]
    device: str
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    plugin_modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    @property
    def log(self) -> Path:
        """Where everything goes that the child prints."""
        return self.folder / "logs" / f"{slug(self.variant)}.log"


@dataclass(frozen=True)
class Order:
    """One utterance to speak. `audio` says where to keep the clip in the run's folder; None: nowhere."""

    text: str
    voice: str
    seed: int
    n_tokens: int | None = None
    audio: str | None = None


class ChildError(RuntimeError):
    """A child that raised, hung or died; the message holds its last words and ends with what happened."""


# -- the parent's end ----------------------------------------------------------------------------------------


_server_starts: list[float] = []


def start_server() -> None:
    """Start the forkserver, if it does not run yet; it imports the heavy packages while the caller goes on."""
    if not _server_starts:
        _server_starts.append(time.monotonic())
    _context()
    ensure_running()


def take_server_start() -> float | None:
    """When the packages' imports began (`time.monotonic`): where the clock of the first job that asks starts."""
    return _server_starts.pop() if _server_starts else None


def _context() -> ForkServerContext:
    # transformers and diffusers ask for CUDA when imported. By default PyTorch asks the CUDA runtime, after which no
    # forked child can use it; asked this way, it asks the driver's management library instead.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Worker:
    """The parent's handle on one variant's process."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.failure: str | None = None
        setup.log.parent.mkdir(parents=True, exist_ok=True)
        context = _context()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, setup), name=setup.variant, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        return self.failure is None

    def ask(self, method: str, *arguments: Any, limit_s: float) -> Any:
        """The answer of `Variant.<method>`.

        Raises UserError as the child raised it. Raises ChildError for an exception in the child, which lives
        on, for no answer within `limit_s`, after which the child is ended, and for a child that died.
        """
        if self.failure:
            raise ChildError(f"not attempted, the process had ended before: {self.failure}")
        try:
            self._connection.send((method, arguments, limit_s))
            if not wait([self._connection, self._process.sentinel], timeout=limit_s + TRACE_MARGIN_S):
                raise self._end(f"{method} did not answer within {limit_s:g} s and was ended")
            status, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise self._end(f"the process died in {method}: {_exit_words(self._process.exitcode)}") from None
        if status == "user_error":
            raise UserError(answer)
        if status == "error":
            raise ChildError(answer)
        return answer

    def stop(self) -> None:
        """End the process, whatever it is doing; nothing to do for one that has ended."""
        self._connection.close()
        self._process.join(timeout=1.0 if self.alive else 0.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _end(self, words: str) -> ChildError:
        self.failure = words
        self.stop()
        return ChildError(f"{self._last_words()}\n{words}".strip())

    def _last_words(self) -> str:
        try:
            lines = self.setup.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_TAIL_LINES:])


def _exit_words(code: int | None) -> str:
    """How a process ended: its signal's name, or its exit code."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (often the system ran out of memory)" if name == "SIGKILL" else name


# -- the child's end -----------------------------------------------------------------------------------------


def serve(connection: Connection, setup: Setup) -> None:
    """Answer the parent's questions until it closes the pipe; end with the parent, however it ends."""
    for interruption in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle: it ends its children
        signal.signal(interruption, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = _redirect_output(setup.log)
    inherited = dict(os.environ)
    os.environ.update(setup.environment)
    variant = Variant(setup, inherited)
    while True:
        try:
            method, arguments, limit_s = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(limit_s, file=log)
        try:
            answer = "ok", getattr(variant, method)(*arguments)
        except UserError as error:
            answer = "user_error", str(error)
        except Exception:
            answer = "error", traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _redirect_output(path: Path) -> Any:
    """Send standard output and error, also those of C libraries, to a file."""
    log = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    return log


class Variant:
    """One pipeline with its optimizations, inside its own process."""

    def __init__(self, setup: Setup, inherited: Mapping[str, str] | None = None) -> None:
        """`inherited` are the environment's variables as they would have been without the optimizations."""
        self.setup = setup
        self.inherited = inherited or {}

    def load(self) -> dict[str, Any]:
        """Load the pipeline and apply the optimizations; what that cost, and what became of each."""
        import torch

        from harness import environment, measure

        start = time.perf_counter()
        if self.setup.threads:
            torch.set_num_threads(self.setup.threads)
        self.device = torch.device(self.setup.device)
        held = measure.held_mb(self.device)
        load = import_path(self.setup.loader)
        create: Any = import_catalogue(self.setup.plugin_modules).create if self.setup.plugins else None
        self.fitted = fit(
            lambda: load(device=self.setup.device, **self.setup.loader_arguments),
            self.setup.plugins,
            create,
            self.inherited,
        )
        self.pipeline = self.fitted.pipeline
        measure.synchronize(self.device)
        load_s = time.perf_counter() - start
        return {
            "imports_s": IMPORTS_S,
            "load_s": load_s,
            "model_memory_mb": measure.held_mb(self.device) - held,
            "memory_kind": measure.memory_kind(self.device),
            "trained": self.pipeline.trained,
            "voices": sorted(self.pipeline.voices),
            "device": environment.describe_device(self.device),
            "optimizations": self.fitted.statuses,
        }

    def speak(self, orders: Sequence[Order]) -> list[dict[str, Any]]:
        """Speak in one call: for each utterance the figures of a row of utterances.jsonl, and its share of the call.

        An utterance's share is that of its audio, so that shares add up to the call, in every figure of time.
        """
        from harness import measure

        measure.reset_peak(self.device)
        start = time.perf_counter()
        try:
            utterances, seconds = measure.timed(self.device, lambda: self._synthesize(orders))
        except UserError:
            raise
        except Exception:
            failed = {"status": "failed", "error": traceback.format_exc(), "batch_size": len(orders)}
            return [failed | {"wall_s": (time.perf_counter() - start) / len(orders)} for _ in orders]
        memory = measure.peak(self.device)
        audio_s = sum(utterance.audio_s for utterance in utterances)
        shares = [utterance.audio_s / audio_s if audio_s else 1 / len(orders) for utterance in utterances]
        return [
            {
                **self._row(order, utterance),
                "generation_time_s": seconds * share,
                "stages_s": {stage: spent * share for stage, spent in utterance.stages_s.items()},
                "batch_size": len(orders),
                "peak_memory_mb": memory.peak_mb,
                "memory_kind": memory.kind,
                "memory": memory.detail,
                "wall_s": seconds * share,
            }
            for order, utterance, share in zip(orders, utterances, shares, strict=True)
        ]

    def _synthesize(self, orders: Sequence[Order]) -> list[Any]:
        if len(orders) == 1:
            (order,) = orders
            return [self.pipeline.synthesize(order.text, order.voice, order.seed, n_tokens=order.n_tokens)]
        from harness.pipeline import Request

        requests = [Request(order.text, order.voice, order.seed, order.n_tokens) for order in orders]
        return self.pipeline.synthesize_batch(requests)

    def _row(self, order: Order, utterance: Any) -> dict[str, Any]:
        """What is an utterance's own; its clip is written where the order says."""
        if order.audio:
            _write_wave(self.setup.folder / order.audio, utterance.wave, utterance.sample_rate)
        return {
            "status": "ok",
            "audio_s": utterance.audio_s,
            "n_tokens": utterance.n_tokens,
            "n_segments": len(utterance.segments),
            "hit_token_cap": utterance.hit_token_cap,
            "eos": None if order.n_tokens else not utterance.hit_token_cap,
            "audio": order.audio,
            **_sound(utterance.wave),
        }

    def state(self) -> dict[str, Any]:
        """The device's clocks, temperature and processes, as this process sees them."""
        from harness import measure

        return measure.device_state(self.device)

    def record_stages(self, cases: Sequence[Any], seed: int, path: Path) -> bool:
        """Speak `harness.quality.replay.Case`s and keep in `path` what went from stage to stage."""
        from harness.quality import replay

        replay.save(path, replay.record(self.pipeline, cases, seed))
        return True

    def replay_stages(self, cases: Sequence[Any], seed: int, inputs: Path, path: Path) -> bool:
        """Keep in `path` what each stage makes of the recorded inputs."""
        from harness.quality import replay

        replay.save(path, replay.replay(self.pipeline, cases, replay.load(inputs, replay.Inputs), seed))
        return True

    def evidence(self) -> dict[str, dict[str, Any]]:
        """After the runs: what each optimization shows for having been active."""
        return self.fitted.evidence()


def _sound(wave: Any) -> dict[str, Any]:
    """Level [dBFS, rms], and whether the wave [samples] is silent or holds NaN or infinity."""
    import numpy as np

    if wave.size == 0:
        return {"level_dbfs": None, "silent": True, "non_finite": False}
    if not np.isfinite(wave).all():
        return {"level_dbfs": None, "silent": False, "non_finite": True}
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
    level = 20 * math.log10(rms) if rms > 0 else None
    return {"level_dbfs": level, "silent": level is None or level < SILENCE_DBFS, "non_finite": False}


def _write_wave(path: Path, wave: Any, sample_rate: int) -> None:
    import numpy as np
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.nan_to_num(wave), sample_rate, subtype="PCM_16")
