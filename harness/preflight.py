"""What can be said of a command before anything heavy is loaded.

PyTorch, transformers and chatterbox take ten seconds to import and a model takes more. Most mistakes can be seen
without them: a file that is not there, a hub that does not answer, a voice that nobody knows. What only the packages
can tell is left to them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import hub, workload
from harness.devices import count_gpus
from harness.errors import UserError
from harness.plugins import check_path
from harness.quality.judges import check_judges
from harness.sampling import check_language, check_speaking
from harness.settings import did_you_mean

OWN_LOADER = "harness.checkpoints.load"
MINI_VOICES = Path(__file__).resolve().parent / "mini" / "weights" / "voices"
UNTRAINED = ("random", "random_multilingual", "random_turbo", "random_nano", "tiny_turbo")
PIPELINES = ("mini", "mini_multilingual", "chatterbox", "multilingual", "turbo", "nano", *UNTRAINED)


def look(settings: Mapping[str, Any], here: bool = True) -> list[str]:
    """Warnings about what a configuration asks for, to be measured `here` or by another host's devices.

    Raises UserError for what cannot be given.
    """
    for name in ("results_dir", "reports_dir"):
        check_folder(name, settings[name])
    if here:
        check_device(settings["device"])
    check_loader(settings["pipeline"])
    check_speaking(settings["pipeline"])
    asked = workload.load_workload(settings["workload"])
    for item in asked.items:
        check_language(settings["pipeline"], item.language, f"workload, text {item.text_id}: language")
    if (voices := built_in_voices(settings["pipeline"])) is not None:
        workload.fit_voices(asked.items, voices)
    check_gate(settings["gate"])
    check_models(settings)
    return [*_left_out(settings), *asked.warnings]


def _left_out(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("left_out")
    return [f"on a CPU {', '.join(names)} cannot run, so this {settings['sweep']} is of the others"] if names else []


def check_folder(setting: str, folder: str) -> None:
    """Raises UserError for a folder that cannot be made or written into."""
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{setting}={folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{setting}={folder}: no permission to write in {there}; name another folder")


# -- the device ------------------------------------------------------------------------------------------------------


def check_device(device: str) -> None:
    """Raises UserError for a device that is not one, or that the driver does not have."""
    kind, _, index = str(device).partition(":")
    if device != "auto" and (kind not in ("cpu", "cuda") or not (index.isdigit() or not index)):
        raise UserError(f"device={device}: there is auto, cpu, cuda and cuda:N")
    if kind == "cuda" and (count := count_gpus()) is not None and int(index or 0) >= count:
        raise UserError(f"device={device}: the driver has {count} CUDA devices here; try device=cpu")


# -- the model -------------------------------------------------------------------------------------------------------


def check_loader(pipeline: Mapping[str, Any]) -> None:
    """Raises UserError for a loader that is not there, or a checkpoint that this project does not know."""
    name = pipeline["name"]
    check_path(pipeline["loader"])
    if pipeline["loader"] == OWN_LOADER and name not in PIPELINES:
        raise UserError(
            f"unknown pipeline {name!r}{did_you_mean(name, PIPELINES)}: choose one of {', '.join(PIPELINES)}"
        )


def built_in_voices(pipeline: Mapping[str, Any]) -> list[str] | None:
    """The voices that a checkpoint brings; None where only loading it can tell."""
    if pipeline["loader"] != OWN_LOADER:
        return None
    if pipeline["name"].startswith("mini"):
        return sorted(path.stem for path in MINI_VOICES.glob("*.pt"))
    return ["random"] if pipeline["name"] in UNTRAINED else ["default"]


def check_models(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint or a judge that is in no folder, in no cache and on no hub that answers."""
    pipeline = settings["pipeline"]
    check_checkpoint(pipeline)
    if not (pipeline["loader"] == OWN_LOADER and pipeline["name"] in UNTRAINED):  # what cannot speak is not judged
        check_judges(settings["quality"])


def check_checkpoint(pipeline: Mapping[str, Any]) -> None:
    if pipeline["loader"] == OWN_LOADER and pipeline["name"] in hub.CHECKPOINTS:
        hub.check_checkpoint(pipeline["name"], pipeline["checkpoint_dir"])


# -- the gate --------------------------------------------------------------------------------------------------------


def check_gate(settings: Mapping[str, Any]) -> None:
    """Raises UserError for rules that are none: a limit that does not parse, two of one metric, none at all."""
    from harness.gate import rules_from  # which brings the statistics along

    rules_from(settings)
