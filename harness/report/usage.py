"""The lines with which an application uses what a run measured."""

from collections.abc import Mapping
from typing import Any

from harness import combos, declared
from harness.report.data import Run
from harness.sampling import LANGUAGE, changed

ENGLISH = "chatterbox.tts", "ChatterboxTTS"
MULTILINGUAL = "chatterbox.mtl_tts", "ChatterboxMultilingualTTS"


def lines(run: Run) -> str:
    """Python: upstream's object for the run's pipeline, checkpoint and kind of device, and on it what was measured."""
    multilingual = "multilingual" in run.summary.pipeline
    module, name = MULTILINGUAL if multilingual else ENGLISH
    pipeline = run.job.get("pipeline") or {}
    language = f', language_id="{pipeline.get("language") or LANGUAGE}"' if multilingual else ""
    asked = {name: value for name, value in changed(pipeline).items() if name != "max_new_tokens"}
    settings = "".join(f", {name}={value}" for name, value in asked.items())
    return "\n".join(
        [
            f"from {module} import {name}",
            "from chatterbox_harness import optimize",
            *(f"import {plugins}" for plugins in run.job.get("plugin_modules") or ()),
            "",
            f"tts = optimize({name}.{_loading(run)}, {_combo(run)})",
            f'wave = tts.generate("Hello there."{language}{settings})',
        ]
    )


def _loading(run: Run) -> str:
    device = "cuda" if run.baseline.memory_kind == "vram" else "cpu"
    folder = (run.job.get("pipeline") or {}).get("checkpoint_dir")
    return f'from_local({folder!r}, "{device}")' if folder else f'from_pretrained("{device}")'


def _combo(run: Run) -> str:
    """Its name, where the run's settings are those of the file of that name; else what was active, as a mapping."""
    if _is_committed(run):
        return f'"{run.name}"'
    active = active_parameters(run)
    return "\n".join(["{", *(f'    "{name}": {parameters!r},' for name, parameters in active.items()), "}"])


def active_parameters(run: Run) -> dict[str, dict[str, Any]]:
    """What was active, with its parameters."""
    parameters = run.parameters()
    return {name: parameters.get(name, {}) for name in run.summary.active}


def _is_committed(run: Run) -> bool:
    """Whether the file of the combo's name says today what the run measured, in all that the run noted."""
    file = combos.FILES / f"{run.name}.yaml"
    if not file.is_file():
        return False
    catalogue, measured = declared.read(), run.parameters()
    listed = {name: parameters for name, parameters in combos.read_file(file).items() if parameters.get("enabled")}
    return set(listed) == set(run.summary.enabled) and all(
        _agree(measured.get(name, {}), {**catalogue[name].defaults, **parameters})
        for name, parameters in listed.items()
    )


def _agree(measured: Mapping[str, Any], committed: Mapping[str, Any]) -> bool:
    return all(name in committed and committed[name] == value for name, value in measured.items())
