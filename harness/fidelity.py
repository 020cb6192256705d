"""Fidelity alone: how far combos are from the baseline, stage by stage on the same inputs, with nothing timed.

    python -m harness fidelity production compile --pipeline random --device cuda --out FOLDER

A name is a combo's, or else an optimization's, which then has what it requires beside it; without names, all combos and
every optimization. One process holds the model: the baseline speaks a few texts, then each combo is put on it, given
the baseline's inputs, compared and taken off again, which takes seconds where a job takes a minute. First comes the
baseline once more: on a GPU not even that is the same to the last bit. An optimization shows afterwards that it was
active, as in a job; what is no part of a stage, as speaking in pieces is not, cannot be.

    fidelity.json   figures, their intervals over texts, limits and verdicts; what was active; where it ran
    report.md       the same as a table and a picture, and report.html

A folder that is there is gone on with, also by several processes at once: what it has is not compared again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import combos, declared, preflight
from harness.console import say
from harness.designs import closure
from harness.errors import UserError
from harness.locations import HELD_OUT
from harness.results import BASELINE, finite, told_commit, write_atomically

SEED = 0
RECORD = "fidelity.json"
Toggles = Mapping[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="a combo or an optimization (default: all)")
    parser.add_argument("--pipeline", default="mini", help="as in configs/pipeline (default: mini)")
    parser.add_argument("--checkpoint-dir", help="a folder with the checkpoint's files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--texts", type=int, default=6, help="held-out sentences to speak: six or more give intervals")
    parser.add_argument("--tokens", type=int, default=40, help="speech tokens of each, 25 a second")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")


def run(options: argparse.Namespace) -> None:
    """Raises UserError for a name, a pipeline or a device that there is not, and for a folder of other things."""
    preflight.check_device(options.device)
    pipeline = {"name": options.pipeline, "loader": preflight.OWN_LOADER, "checkpoint_dir": options.checkpoint_dir}
    preflight.check_loader(pipeline)
    preflight.check_checkpoint(pipeline)
    if min(options.texts, options.tokens) < 1:
        raise UserError("--texts and --tokens: give 1 or more")
    names = dict.fromkeys((BASELINE, *(options.names or everything())))
    sides = {name: toggles_of(name, gpu=options.device != "cpu") for name in names}
    there = _there(options)
    left = {name: toggles for name, toggles in sides.items() if not _is_compared(there.get(name, {}))}
    if left:
        _compare_into(options, left)

    from harness.report.fidelity import write_page

    say(str(write_page(_read(options.out) or {}, options.out)))


def _compare_into(options: argparse.Namespace, sides: Mapping[str, Toggles]) -> None:
    """Compare, and put each combo into the folder as soon as it is."""
    from harness.checkpoints import load
    from harness.environment import describe, describe_device
    from harness.job import resolve_device
    from harness.quality.replay import Case

    device = resolve_device(options.device)
    with contextlib.redirect_stdout(sys.stderr):  # upstream tells there what it loads
        model = load(options.pipeline, device, options.checkpoint_dir)
    texts = HELD_OUT.read_text(encoding="utf-8").splitlines()[: options.texts]
    voices = sorted(model.voices)
    cases = [Case(f"s{i}", text, voices[i % len(voices)], options.tokens) for i, text in enumerate(texts)]
    about: dict[str, Any] = {
        "pipeline": options.pipeline,
        "environment": describe("", describe_device(model.device)),
        "cases": [asdict(case) for case in cases],
    }
    commit = told_commit(about["environment"]["git"])
    _check_device(options.out, about)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, found in compare_combos(model, sides, cases):
        verdicts = {stage: one["verdict"] for stage, one in found.get("stages", {}).items()}
        told = ", ".join(f"{stage} {verdict}" for stage, verdict in verdicts.items())
        idle = [
            f"{one} {made['status']}" for one, made in found.get("applied", {}).items() if made["status"] != "active"
        ]
        say("; ".join([f"{name}: {told or found.get('reason', 'nothing of it can run here')}", *idle]))
        _add(options.out, about, name, finite({**found, "commit": commit}))


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _there(options: argparse.Namespace) -> dict[str, Any]:
    """The combos that the folder has. Raises UserError if they were compared on something else than is asked for."""
    record = _read(options.out)
    if record is None:
        return {}
    wanted = options.pipeline, [options.tokens] * options.texts
    if (record["pipeline"], [case["n_tokens"] for case in record["cases"]]) != wanted:
        raise UserError(f"{options.out} has another --pipeline, --texts or --tokens: name another --out")
    return record["combos"]


def _check_device(folder: Path, about: Mapping[str, Any]) -> None:
    """Raises UserError for a folder whose combos were compared on another device."""
    known, here = (one and one["environment"]["device"]["name"] for one in (_read(folder), about))
    if known not in (None, here):
        raise UserError(f"{folder} was made on {known}, and this is {here}: name another --out")


def _is_compared(found: Mapping[str, Any]) -> bool:
    return "applied" in found


def _add(folder: Path, about: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> None:
    """Put a combo into the folder's record, to which other processes may be adding theirs."""
    holder = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        record = _read(folder) or {**about, "combos": {}}
        order = {one: place for place, one in enumerate((BASELINE, *everything()))}
        combos = {**record["combos"], name: found}
        record["combos"] = dict(sorted(combos.items(), key=lambda one: order.get(one[0], len(order))))
        write_atomically(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    finally:
        os.close(holder)  # and with it goes the lock


def everything() -> list[str]:
    """All combos, and every optimization by itself."""
    return list(dict.fromkeys([*(name for name in _combos() if name != BASELINE), *declared.read()]))


def _combos() -> list[str]:
    return sorted(path.stem for path in combos.FILES.glob("*.yaml"))


def toggles_of(name: str, gpu: bool) -> Toggles:
    """What a name switches on, in the order of application. Raises UserError for one that is nobody's."""
    catalogue = declared.read()
    if name in catalogue and name not in _combos():
        needed = closure([name], lambda one: catalogue[one].requirements(gpu))
        return {one: {} for one in catalogue if one in needed}
    listed = combos.read_file(combos.combo_file(name))
    on = {one: dict(settings) for one, settings in listed.items() if settings.pop("enabled", False)}
    return {one: on[one] for one in catalogue if one in on}


def compare_combos(pipeline: Any, sides: Mapping[str, Toggles], cases: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each combo with its stages' figures and verdicts, if anything of it can run here, and what of it was active.

    Without toggles it is the baseline, once more. One that raises has the reason instead.
    """
    import torch

    from harness.fitting import fit
    from harness.plugins import import_catalogue
    from harness.quality.fidelity import compare, summarize
    from harness.quality.replay import record, replay

    inputs = record(pipeline, cases, SEED)
    reference = replay(pipeline, cases, inputs, SEED)
    create = import_catalogue().create

    def unchanged() -> Any:
        pipeline.reset()
        return pipeline

    for name, toggles in sides.items():
        found: dict[str, Any] = {}
        try:
            with contextlib.redirect_stdout(sys.stderr):
                fitted = fit(unchanged, toggles, create)
                if fitted.plugins or not toggles:
                    traces = replay(pipeline, cases, inputs, SEED)
                    compared = [compare(*pair) for pair in zip(reference, traces, strict=True)]
                    found = {"stages": summarize(compared, [case.text_id for case in cases])}
                found["applied"] = {name: _shown(status) for name, status in fitted.evidence().items()}
        except Exception:
            found = {"reason": traceback.format_exc().strip().splitlines()[-1]}
        pipeline.reset()
        gc.collect()
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        yield name, found


def _shown(status: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an optimization was active, why it was not, and what it had changed that still stood."""
    why = (status["reason"] or "").strip().splitlines()
    changes = status["evidence"].get("changes", [])
    return {"status": status["status"], "reason": why[-1] if why else None, "changes": changes}
