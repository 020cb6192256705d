"""An optimization of your own: a file to fill in, and a test that holds it to its word.

    python -m harness new-optimization my_trick                  into the catalogue of this checkout
    python -m harness new-optimization my_trick --folder mine    beside your own code

In a checkout it is written to optimizations/my_trick.py, applied after the others (only moving off the device and
warming up come later), and switched on like them: `run_sweep.py optimizations.my_trick.enabled=true`. With --folder,
or where the harness is installed, it stays a module of yours, and the command names it: `plugin_modules=[my_trick]`.

As it is written, it counts the vocoder's calls and changes no sample: it runs, its test passes, and its report says
"no detectable change". Nothing is ever overwritten.
"""

import argparse
import keyword
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UserError
from harness.locations import ROOT

NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")
TAKEN = {"Evidence", "Optimization", "Pipeline", "Stage"}
"""What a plugin's file imports."""
LATER = '    "cpu_offload",\n'
"""The first of those in the order of application that come after everybody else's."""
LAYER = re.compile(r'("bench",\n\s*""")(.*?)(?=""")', re.DOTALL)
"""The plugins in import-linter's contract."""

PLUGIN = '''"""{name}: one line that says what changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.pipeline import Pipeline, Stage
from optimizations.base import Evidence, Optimization, register
from optimizations.common.probe import probe


@register
class {title}(Optimization):
    """What this does, in a sentence.

    Baseline: what upstream does.
    Change: what is done instead.
    Why: what that saves, and of what.
    Where not: where nothing is left to save, or where it costs.
    Evidence: what is counted or read in the pipeline, and which figures mean that it was active.
    """

    name = "{name}"
    extra = True  # not one of the campaign's twelve
    lossless = True  # False where words, voice or sound may change

    @dataclass
    class Config:
        """Parameters: fields with defaults, limits by `number` and `choice` of `harness.settings`."""

    def unavailable(self, pipeline: Pipeline) -> str | None:
        return None  # or why it cannot run here, in words that somebody can act on

    def apply(self, pipeline: Pipeline) -> None:
        self.calls = 0
        pipeline.wrap_stage("mel_to_wave", self._counted)  # every change goes through a method of the pipeline's

    def _counted(self, stage: Stage) -> Stage:
        def run(*args: Any) -> Any:
            self.calls += 1
            return stage(*args)

        return run

    def evidence(self, pipeline: Pipeline) -> Evidence:
        self.calls = 0
        probe(pipeline)
        return Evidence(self.calls > 0, {{"calls_per_utterance": self.calls}})
'''

TEST = '''"""{name}: it was active, it speaks as the baseline does, and it leaves no trace."""

from __future__ import annotations

import numpy as np

from harness import checkpoints
from harness.fitting import fit
from harness.plugins import import_catalogue


def test_{name}():
    catalogue = import_catalogue({modules})
    pipeline = checkpoints.load("mini", "cpu")
    voice = next(iter(pipeline.voices))

    def wave():
        return pipeline.synthesize("Yes, it does.", voice, seed=1, n_tokens=20).wave

    baseline = wave()
    fitted = fit(lambda: pipeline, {{"{name}": {{}}}}, catalogue.create)
    np.testing.assert_allclose(wave(), baseline, atol=1e-3)  # lossless: the same to rounding
    status = fitted.evidence()["{name}"]
    assert status["status"] == "active", status["reason"]
    pipeline.reset()
    np.testing.assert_array_equal(wave(), baseline)
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="small letters, digits and underscores, as in my_trick")
    parser.add_argument(
        "--folder", type=Path, help="write both files there, as a module of yours (default: into this checkout)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the files, and say what comes next. Raises UserError for a name that cannot be, or is taken."""
    _check(options.name)
    checkout = (ROOT / "optimizations" / "__init__.py").is_file() and (ROOT / "pyproject.toml").is_file()
    if options.folder is None and checkout:
        written, command = into_catalogue(options.name, ROOT), f"optimizations.{options.name}.enabled=true"
    else:
        folder = options.folder or Path()
        written = beside(options.name, folder)
        command = f"'plugin_modules=[{options.name}]' optimizations.{options.name}.enabled=true"
        if folder.resolve() != Path.cwd():
            print(f"Python has to find it: export PYTHONPATH={folder.resolve()}")
    print(f"{written[0]}: fill it in")
    print(f"{written[1]}: python -m pytest {written[1]}")
    print(f"then measure it: python run_sweep.py {command}")
    return 0


def into_catalogue(name: str, root: Path) -> list[Path]:
    """Write plugin and test into a checkout, and list the plugin where the others are; the two files' paths."""
    catalogue, project = root / "optimizations" / "__init__.py", root / "pyproject.toml"
    order, contracts = catalogue.read_text(encoding="utf-8"), project.read_text(encoding="utf-8")
    if LATER not in order or not LAYER.search(contracts):
        raise UserError(f"{catalogue} or {project} lists the optimizations in a way of its own: use --folder")
    written = _write(
        {
            root / "optimizations" / f"{name}.py": PLUGIN.format(name=name, title=_title(name)),
            root / "tests" / f"test_opt_{name}.py": TEST.format(name=name, modules=""),
        }
    )
    catalogue.write_text(order.replace(LATER, f'    "{name}",\n{LATER}'), encoding="utf-8")
    project.write_text(LAYER.sub(rf"\1\2\n    | {name}", contracts), encoding="utf-8")
    return written


def beside(name: str, folder: Path) -> list[Path]:
    """Write plugin and test into a folder; their paths. Raises UserError for the name of a module that there is."""
    if find_spec(name) is not None:
        raise UserError(f"{name}: Python has a module of that name, which yours would hide; choose another name")
    return _write(
        {
            folder / f"{name}.py": PLUGIN.format(name=name, title=_title(name)),
            folder / f"test_{name}.py": TEST.format(name=name, modules=f'["{name}"]'),
        }
    )


def _check(name: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot be an optimization's name: use small letters, digits and underscores, a letter first, at "
            "most 60 of them, and no word of Python's, as in my_trick"
        )
    catalogue = Path(str(find_spec("optimizations").origin)).parent
    if (catalogue / name).exists() or (catalogue / f"{name}.py").exists():
        raise UserError(f"{name}: the catalogue has a module of that name, {catalogue / name}; choose another name")
    if _title(name) in TAKEN:
        raise UserError(
            f"{name}: its class would be called {_title(name)}, as one of the harness's; choose another name"
        )


def _title(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _write(files: Mapping[Path, str]) -> list[Path]:
    """Write new files. Raises UserError, with nothing written, where one is there already."""
    for path in files:
        if path.exists():
            raise UserError(f"{path} is there already, and nothing is overwritten: choose another name")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): name another --folder") from None
    return list(files)
