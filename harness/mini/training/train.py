"""Train the miniature from nothing: `python -m harness.mini.training --parallel`.

Stages form a small graph; each is a module with `train(corpus, run) -> validation figures`:

    sounds (3 h of speech) ──> tokenizer, speakers, hift, vocos
    words (48 h)           ──> tokens (needs tokenizer) ──> flow, t3 (need speakers) ──> align ──> export

Sounds are learned from a few hours while the many hours that spelling needs are still being spoken. A finished
stage is skipped and an interrupted one resumes, so the command can be given again; naming stages runs only those.
`--parallel` starts every stage as soon as what it needs is done, all on one GPU: none of them fills it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.mini.training.run import Run
from harness.mini.training.speech import Corpus, make_corpus

HOURS = {"sounds": 3.0, "words": 48.0}


@dataclass(frozen=True)
class Stage:
    """What a stage runs ("module:function"), the corpus it is given, and the stages before it."""

    function: str
    corpus: str | None = None
    needs: tuple[str, ...] = ()


STAGES = {
    "sounds": Stage("train:make_data"),
    "tokenizer": Stage("tokenizer:train", "sounds", ("sounds",)),
    "speakers": Stage("speakers:train", "sounds", ("sounds",)),
    "hift": Stage("hift:train", "sounds", ("sounds",)),
    "vocos": Stage("vocos:train", "sounds", ("sounds",)),
    "words": Stage("train:make_data", needs=("sounds",)),  # not beside `sounds`: both want every core
    "tokens": Stage("tokenizer:train_tokens", "words", ("words", "tokenizer")),
    "flow": Stage("flow:train", "words", ("tokens", "speakers")),
    "t3": Stage("t3:train", "words", ("tokens", "speakers")),
    "align": Stage("align:train", "words", ("t3",)),
    "export": Stage("export:train", needs=("align", "flow", "hift", "vocos", "speakers", "tokenizer")),
}


def make_data(name: str, run: Run, workers: int | None = None) -> dict[str, float]:
    """Speak one of the corpora and save it under run.folder/<name>."""
    seed = 1000 * run.seed + list(HOURS).index(name)
    corpus = make_corpus(max(0.03, HOURS[name] * run.scale), seed, workers)
    corpus.save(run.folder / name)
    return {"hours": corpus.hours, "utterances": float(len(corpus)), "texts": float(len(set(corpus.texts)))}


def run_stage(name: str, run: Run) -> dict[str, float]:
    """Run one stage in this process unless it is finished; returns its validation figures."""
    if (figures := run.finished(name)) is not None:
        return figures
    stage = STAGES[name]
    missing = [need for need in stage.needs if run.finished(need) is None]
    if missing:
        raise UserError(f"stage {name} needs {', '.join(missing)}: run those first, or name no stage to run all")
    started = time.monotonic()
    module, function = stage.function.split(":")
    work: Callable = getattr(importlib.import_module(f"harness.mini.training.{module}"), function)
    given = Corpus.load(run.folder / stage.corpus) if stage.corpus else name
    figures = work(given, run)
    run.finish(name, figures | {"stage_seconds": time.monotonic() - started})
    print(f"{name} done:", *(f"{key}={value:.4g}" for key, value in figures.items()), flush=True)
    return figures


def run_parallel(names: list[str], run: Run) -> None:
    """Run stages as child processes, each as soon as its needs are met. Raises UserError when one fails."""
    waiting = [name for name in names if run.finished(name) is None]
    running: dict[str, subprocess.Popen] = {}
    options = ["--folder", run.folder, "--device", run.device, "--seed", run.seed, "--scale", run.scale]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    while waiting or running:
        for name in [n for n in waiting if all(run.finished(need) is not None for need in STAGES[n].needs)]:
            command = [sys.executable, "-m", "harness.mini.training", name, *map(str, options)]
            running[name] = subprocess.Popen(command, env=environment)
            waiting.remove(name)
        ended = [name for name, child in running.items() if child.poll() is not None]
        failed = [name for name in ended if running.pop(name).returncode != 0]
        if failed or (waiting and not running):
            for child in running.values():
                child.terminate()
            raise UserError(f"stage {(failed or waiting)[0]} could not run: see its output above")
        time.sleep(0.2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.mini.training", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"stages to run (default: all): {' '.join(STAGES)}")
    parser.add_argument("--folder", type=Path, default=Path("outputs/mini"), help="where everything is kept")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data and steps of the full recipe")
    parser.add_argument("--parallel", action="store_true", help="run independent stages at the same time")
    options = parser.parse_args(arguments)
    names = options.stages or list(STAGES)
    for name in names:
        if name not in STAGES:
            parser.error(f"no stage {name!r}; there are: {', '.join(STAGES)}")
    run = Run(options.folder, options.device, options.seed, options.scale)
    try:
        if options.parallel:
            run_parallel(names, run)
        else:
            for name in names:
                run_stage(name, run)
    except UserError as error:
        sys.exit(f"error: {error}")
