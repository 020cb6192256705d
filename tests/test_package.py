"""The package that `uv build` makes has inside what the commands read."""

from __future__ import annotations

import shutil
import subprocess
import zipfile

import pytest
from conftest import ROOT

INSIDE = {
    "chatterbox_harness.py",
    "run_sweep.py",
    "harness/application.py",
    "harness/schema/summary.schema.json",
    "harness/tests/data/held_out_sentences.txt",  # configs/workload/standard.yaml names it
    "optimizations/t3/decode.cpp",
    "optimizations/vocoder/hift.cpp",
    *(f"harness/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")),
    *(str(path.relative_to(ROOT)) for path in (ROOT / "harness/mini/weights").rglob("*.*") if path.is_file()),
}


@pytest.mark.slow  # asks the package index for the build's own tool
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the package")
def test_the_wheel_holds_configs_schema_weights_and_commands(tmp_path):
    subprocess.run(["uv", "build", "--wheel", "--out-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert names >= INSIDE
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "chatterbox_harness.py",
        "harness",
        "hydra_plugins",  # where Hydra looks for the sweeper of this project
        "optimizations",
        "run_sweep.py",
    }
    assert "chatterbox-harness = run_sweep:main" in scripts
    assert "chatterbox-say = harness.say:main" in scripts
