"""One variant's process, from both ends of its pipe.

`Worker` is the parent's end: it starts the process, asks, waits no longer than a limit, and turns a child
that raises, hangs or dies into a `ChildError` that says how. It has the only clock that decides. `serve` is the
child's end: it holds a `Variant`, one pipeline with its optimizations, and answers until the pipe closes.

Children come from a forkserver that has imported the heavy packages once and has not touched CUDA. Each is a
fresh process with its own environment variables, set before its CUDA starts, so that nothing a plugin changes
can leak into the reference beside it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from harness.answers import CHUNK, Order, Part, encode
from harness.errors import UserError
from harness.load import News
from harness.locations import trace, without_folders
from harness.variant import Setup, Variant

PRELOADED = ["harness.preload"]
TRACE_MARGIN_S = 2.0
"""A child writes where it hangs this long before the parent ends it."""
LOG_TAIL_LINES = 40
SAMPLE_BYTES = 4
MOST_NEWS = 64
LONGEST_WAIT_S = 60.0
"""What a wait for news takes at most, for nobody in particular."""


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
    """The parent's handle on one variant's process.

    `answered_in_s` is how long the last answer took to arrive, by this process's clock; `chunks` are the samples that
    came before it, each with the seconds until it was there.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.failure: str | None = None
        self.answered_in_s = 0.0
        self.chunks: list[tuple[float, bytes]] = []
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
            start, self.chunks = time.perf_counter(), []
            self._connection.send((method, arguments, limit_s))
            while True:
                self._await(method, limit_s, spent_s=time.perf_counter() - start)
                self.answered_in_s = time.perf_counter() - start
                message = self._connection.recv_bytes()
                if not message.startswith(CHUNK):
                    break
                self.chunks.append((time.perf_counter() - start, message[len(CHUNK) :]))
            status, answer = json.loads(message)
        except (EOFError, ConnectionError):
            raise self._died(method) from None
        except ValueError:
            raise self._end(f"{method} was answered with what no worker says") from None
        if status == "user_error":
            raise UserError(answer)
        if status == "error":
            raise ChildError(answer)
        return answer

    def serve(self, *arguments: Any, sample_rate: int, limit_s: float) -> Conversation:
        """Have the child serve callers for at most `limit_s`, until it is told that nobody comes any more.

        Raises ChildError for a process that has ended.
        """
        if self.failure:
            raise ChildError(f"not attempted, the process had ended before: {self.failure}")
        try:
            self._connection.send(("serve", arguments, limit_s))
        except ConnectionError:
            raise self._died("serve") from None
        return Conversation(self, self._connection, self._process.sentinel, sample_rate)

    def receive(self, blocks: int, limit_s: float) -> list[bytes]:
        """The blocks of bytes that follow an answer. Raises ChildError as `ask` does."""
        try:
            received = []
            for _ in range(blocks):
                self._await("sending audio", limit_s)
                received.append(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._died("sending audio") from None
        return received

    def _await(self, method: str, limit_s: float, spent_s: float = 0.0) -> None:
        left_s = max(0.0, limit_s + TRACE_MARGIN_S - spent_s)
        if not wait([self._connection, self._process.sentinel], timeout=left_s):
            raise self._end(f"{method} did not answer within {limit_s:g} s and was ended")

    def _died(self, method: str) -> ChildError:
        self._process.join()
        return self._end(f"the process died in {method}: {_exit_words(self._process.exitcode)}")

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
        """The end of its log, in which the trace of a process that hung has its folders still: no Python wrote it."""
        try:
            text = without_folders(self.setup.log.read_text(errors="replace"))
            self.setup.log.write_text(text)
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


class Conversation:
    """A child that serves callers, as `harness.load.Counter`. All clocks are read on this side of the pipe: a request
    has come when it is sent, and samples are there when the last of them is received.

    `parts` holds each caller's samples in the order in which they came. `take` and `news` raise ChildError for a child
    that died, or that ends the conversation by itself.
    """

    def __init__(self, worker: Worker, connection: Connection, sentinel: int, sample_rate: int) -> None:
        self._worker, self._connection, self._sentinel = worker, connection, sentinel
        self._bytes_per_s = SAMPLE_BYTES * sample_rate
        self.parts: dict[int, list[bytes]] = {}
        self.open: set[int] = set()

    def take(self, caller: int, request: Order) -> None:
        self.parts[caller] = []
        self.open.add(caller)
        try:
            self._connection.send((caller, request))
        except ConnectionError:
            raise self._worker._died("serve") from None

    def news(self, patience_s: float) -> list[News] | None:
        if not self.open:
            return None
        news: list[News] = []
        while wait([self._connection, self._sentinel], timeout=0.0 if news else min(patience_s, LONGEST_WAIT_S)):
            message = self._receive()
            if not message.startswith(CHUNK):
                raise ChildError(f"it stopped serving: {json.loads(message)[1]}")
            news.append(self._news(message))
            if len(news) >= MOST_NEWS:
                break
        return news

    def end(self, limit_s: float) -> Any:
        """Say that nobody comes any more; the child's answer. Raises ChildError as `Worker.ask` does."""
        try:
            self._connection.send(None)
        except ConnectionError:
            raise self._worker._died("serve") from None
        while True:
            self._worker._await("serve", limit_s)
            message = self._receive()
            if not message.startswith(CHUNK):
                break
        status, answer = json.loads(message)
        if status != "ok":
            raise ChildError(answer)
        return answer

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise self._worker._died("serve") from None

    def _news(self, message: bytes) -> News:
        try:
            part = Part.from_bytes(message[len(CHUNK) :])
            if part.caller not in self.open:
                raise ValueError
        except ValueError:
            raise self._worker._end("serve was answered with what no worker says") from None
        if part.ends:
            self.open.remove(part.caller)
        else:
            self.parts[part.caller].append(part.samples)
        return News(part.caller, len(part.samples) / self._bytes_per_s, part.ends, part.failed)


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
    variant = Variant(
        setup,
        inherited,
        tell=lambda samples: connection.send_bytes(CHUNK + samples),
        hear=lambda wait_for_it: connection.recv() if wait_for_it or connection.poll() else (),
    )
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
            answer = "error", trace()
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(encode(answer))
        for block in variant.take_waves() if method == "account" else ():
            connection.send_bytes(block)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _redirect_output(path: Path) -> Any:
    """Send standard output and error, also those of C libraries, to a file, which is kept: Python writes there without
    this machine's folders, be it a warning, a traceback or a package's logger."""
    log = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
        # On the stream itself, as loggers have kept it since the packages were imported.
        stream.write = partial(_write_without_folders, stream.write)  # type: ignore[method-assign]
    return log


def _write_without_folders(write: Callable[[str], int], text: str) -> int:
    write(without_folders(text))
    return len(text)
