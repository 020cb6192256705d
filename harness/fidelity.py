"""Fidelity alone: how far combos are from the baseline, stage by stage on the same inputs, with nothing timed.

    python -m harness fidelity production compile --pipeline random --device cuda --out FOLDER

A name is a combo's, or an optimization's, which then has what it requires beside it; without names, all combos and
every optimization. One process holds the model: the baseline speaks a few texts, then each combo is put on it, given
the baseline's inputs, compared and taken off again, which takes seconds where a job takes a minute. That an
optimization was active is a job's to show (`run_sweep.py`, whose reports have the same table); here it says what it
changed.

    fidelity.json   figures, their intervals over texts, limits and verdicts; what was applied; where it ran
    report.md       the same as a table and a picture, and report.html
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
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
from harness.results import BASELINE, finite, write_atomically

SEED = 0
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
    """Raises UserError for a name, a pipeline or a device that there is not."""
    preflight.check_device(options.device)
    pipeline = {"name": options.pipeline, "loader": preflight.OWN_LOADER, "checkpoint_dir": options.checkpoint_dir}
    preflight.check_loader(pipeline)
    preflight.check_checkpoint(pipeline)
    if min(options.texts, options.tokens) < 1:
        raise UserError("--texts and --tokens: give 1 or more")
    sides = {name: toggles_of(name, gpu=options.device != "cpu") for name in options.names or everything()}

    from harness.checkpoints import load
    from harness.environment import describe, describe_device
    from harness.job import resolve_device
    from harness.quality.replay import Case
    from harness.report.fidelity import write_page

    device = resolve_device(options.device)
    with contextlib.redirect_stdout(sys.stderr):  # upstream tells there what it loads
        model = load(options.pipeline, device, options.checkpoint_dir)
    texts = HELD_OUT.read_text(encoding="utf-8").splitlines()[: options.texts]
    voices = sorted(model.voices)
    cases = [Case(f"s{i}", text, voices[i % len(voices)], options.tokens) for i, text in enumerate(texts)]
    record: dict[str, Any] = {
        "pipeline": options.pipeline,
        "command": f"python -m harness fidelity {' '.join(options.names)} --pipeline {options.pipeline} "
        f"--device {model.device.type} --texts {options.texts} --tokens {options.tokens}",
        "environment": describe("", describe_device(model.device)),
        "cases": [asdict(case) for case in cases],
        "combos": {},
    }
    for name, found in compare_combos(model, sides, cases):
        record["combos"][name] = found
        verdicts = {stage: one["verdict"] for stage, one in found.get("stages", {}).items()}
        told = ", ".join(f"{stage} {verdict}" for stage, verdict in verdicts.items())
        say(f"{name}: {told or found.get('reason', 'nothing of it can run here')}")
        options.out.mkdir(parents=True, exist_ok=True)
        record = finite(record)
        write_atomically(options.out / "fidelity.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    say(str(write_page(record, options.out)))


def everything() -> list[str]:
    """All combos, and every optimization by itself."""
    return [*sorted(path.stem for path in combos.FILES.glob("*.yaml") if path.stem != BASELINE), *declared.read()]


def toggles_of(name: str, gpu: bool) -> Toggles:
    """What a name switches on, in the order of application. Raises UserError for one that is nobody's."""
    catalogue = declared.read()
    if name in catalogue:
        needed = closure([name], lambda one: catalogue[one].requirements(gpu))
        return {one: {} for one in catalogue if one in needed}
    listed = combos.read_file(combos.combo_file(name))
    on = {one: dict(settings) for one, settings in listed.items() if settings.pop("enabled", False)}
    return {one: on[one] for one in catalogue if one in on}


def compare_combos(pipeline: Any, sides: Mapping[str, Toggles], cases: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each combo with its stages' figures and verdicts, if anything of it can run here, and what was applied.

    One that raises has the reason instead.
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
                traces = replay(pipeline, cases, inputs, SEED) if fitted.plugins else []
            if traces:
                compared = [compare(*pair) for pair in zip(reference, traces, strict=True)]
                found = {"stages": summarize(compared, [case.text_id for case in cases])}
            found["applied"] = applied(fitted)
        except Exception:
            found = {"reason": traceback.format_exc().strip().splitlines()[-1]}
        pipeline.reset()
        gc.collect()
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        yield name, found


def applied(fitted: Any) -> dict[str, dict[str, Any]]:
    """Of each optimization what it changed that still stood, or why it was not applied."""
    standing = fitted.pipeline.standing()
    return {
        name: {"changes": standing.get(name, [])} if name in fitted.plugins else {"reason": status["reason"]}
        for name, status in fitted.statuses.items()
    }
