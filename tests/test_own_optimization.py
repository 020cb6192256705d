"""Your own optimization: the page's example does what the page says, and so does what the command writes."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import optimizations
from harness import checkpoints
from harness.__main__ import main
from harness.fitting import fit
from harness.new_optimization import into_catalogue

PAGE = ROOT / "docs/own_optimization.md"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder where modules are imported from, and a catalogue that is as before afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(optimizations.CATALOGUE)
    yield tmp_path
    optimizations.CATALOGUE.clear()
    optimizations.CATALOGUE.update(before)
    for name in ("folded_vocoder", "my_trick", "test_my_trick"):
        sys.modules.pop(name, None)


def test_the_pages_example_is_short_is_active_and_changes_no_sample(own):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 30
    (own / "folded_vocoder.py").write_text(example)
    importlib.import_module("folded_vocoder")
    pipeline = checkpoints.load("mini", "cpu")
    voice = next(iter(pipeline.voices))
    before = pipeline.synthesize("Yes.", voice, seed=1, n_tokens=10).wave
    fitted = fit(lambda: pipeline, {"folded_vocoder": {}}, optimizations.create)
    np.testing.assert_array_equal(pipeline.synthesize("Yes.", voice, seed=1, n_tokens=10).wave, before)
    status = fitted.evidence()["folded_vocoder"]
    assert status["status"] == "active", status["reason"]
    assert status["evidence"]["parametrized_modules_left"] == 0
    pipeline.reset()
    assert not optimizations.create("folded_vocoder").evidence(pipeline).active


@pytest.mark.slow
def test_what_is_written_into_a_folder_passes_its_own_test(own, capsys):
    assert main(["new-optimization", "my_trick", "--folder", str(own)]) == 0
    told = capsys.readouterr().out
    assert "'plugin_modules=[my_trick]' optimizations.my_trick.enabled=true" in told
    importlib.import_module("test_my_trick").test_my_trick()
    before = (own / "my_trick.py").read_text()
    del sys.modules["my_trick"]
    assert main(["new-optimization", "my_trick", "--folder", str(own)]) == 2
    assert (own / "my_trick.py").read_text() == before


def test_nothing_is_written_where_one_of_the_two_is_there_already(tmp_path, capsys):
    (tmp_path / "test_my_trick.py").touch()
    assert main(["new-optimization", "my_trick", "--folder", str(tmp_path)]) == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test_my_trick.py"]


@pytest.fixture
def checkout(tmp_path):
    """The parts of this checkout that list the catalogue."""
    shutil.copytree(ROOT / "optimizations", tmp_path / "optimizations", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def python(checkout, *arguments: str) -> str:
    path = {"PYTHONPATH": f"{checkout}:{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_written_into_a_checkout_is_listed_where_the_others_are(checkout):
    before = (checkout / "pyproject.toml").read_text()
    plugin, test = into_catalogue("my_trick", checkout)
    assert (plugin, test) == (checkout / "optimizations/my_trick.py", checkout / "tests/test_opt_my_trick.py")
    read = "from harness import declared; print(*declared.read())"
    order = python(checkout, "-c", read).split()
    assert order[-3:] == ["my_trick", "cpu_offload", "warmup"]
    after = (checkout / "pyproject.toml").read_text()
    assert after.replace("\n    | my_trick", "") == before
    assert re.search(r'warmup\n    \| my_trick""",', after)


@pytest.mark.slow  # two more processes that import everything
def test_there_it_passes_its_test_and_the_contracts_hold(checkout):
    _, test = into_catalogue("my_trick", checkout)
    python(checkout, "-m", "pytest", "-p", "no:xdist", "-c", "/dev/null", "--rootdir", str(checkout), str(test))
    shutil.copytree(ROOT / "harness", checkout / "harness", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    python(checkout, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("My-Trick", "'My-Trick' cannot be an optimization's name"),
        ("../trick", "cannot be an optimization's name"),
        ("", "cannot be an optimization's name"),
        ("2fast", "cannot be an optimization's name"),
        ("import", "cannot be an optimization's name"),
        ("tríck", "cannot be an optimization's name"),
        ("trick\n", "cannot be an optimization's name"),
        ("a" * 61, "cannot be an optimization's name"),
        ("kv_cache", "the catalogue has a module of that name"),
        ("base", "the catalogue has a module of that name"),
        ("vocoder", "the catalogue has a module of that name"),
        ("pipeline", "its class would be called Pipeline"),
        ("json", "Python has a module of that name"),
        ("torch", "Python has a module of that name"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_a_line(name, says, tmp_path, capsys):
    assert main(["new-optimization", name, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["new-optimization", "my_trick", "--folder", str(tmp_path / "mine")]) == 2
    assert "cannot write" in capsys.readouterr().err
