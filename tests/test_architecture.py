"""What import-linter cannot see: imports by a string, files that nobody lists, modules that nobody imports here."""

import ast
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import optimizations

ROOT = Path(optimizations.__file__).parent
MACHINERY = ("streams", "t3", "flow", "vocoder", "watermark", "common")
FILES = sorted(ROOT.rglob("*.py"))
BY_NAME = ("import_module", "for_device", "find_spec")
"""Functions that take a module's import path."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def strings(path: Path) -> list[str]:
    """Every string of a file but the docstrings, which may talk about anything."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
    return [node.value for node in constants if isinstance(node.value, str)]


def needs_triton(path: Path) -> bool:
    """Whether a module imports Triton, itself or through one of ours, when it is imported."""
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = [ROOT.parent.joinpath(*name.split(".")).with_suffix(".py") for name in imported if "optimizations." in name]
    return any(name.split(".")[0] == "triton" for name in imported) or any(map(needs_triton, filter(Path.exists, ours)))


def test_on_the_floor_there_is_a_file_for_each_optimization_and_nothing_else() -> None:
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {"__init__", "base", *optimizations.APPLIED}
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == {*MACHINERY, "bench"}


def test_each_room_says_what_flows_through_it_and_names_its_files() -> None:
    for room in MACHINERY:
        said = import_module(f"optimizations.{room}").__doc__ or ""
        missing = [path.name for path in (ROOT / room).iterdir() if path.suffix in (".py", ".cpp")]
        missing = [name for name in missing if name != "__init__.py" and name not in said]
        assert "Begin with" in said
        assert not missing, f"optimizations/{room}/__init__.py does not say what {missing} is for"


@pytest.mark.parametrize("room", MACHINERY)
def test_machinery_names_no_plugin_in_an_import(room: str) -> None:
    """An import by a string hides from import-linter."""
    plugins = {f"optimizations.{name}" for name in optimizations.APPLIED}
    for path in (ROOT / room).rglob("*.py"):
        named = {text for text in strings(path) if any(f"{text}.".startswith(f"{name}.") for name in plugins)}
        assert not named, f"{path} names {named}"


def test_every_import_by_a_string_leads_somewhere_below_its_own_layer() -> None:
    """What a GPU alone imports is never reached here, so its path is looked up."""
    seen = 0
    for path in FILES:
        layer = module_of(path).split(".")[1:2]
        for text in strings(path):
            if re.fullmatch(rf"optimizations\.({'|'.join((*MACHINERY, 'bench'))})(\.\w+)+", text):
                seen += 1
                assert find_spec(text) is not None, f"{path.name} names {text}, which is nowhere"
                if layer and layer[0] in MACHINERY:
                    assert text.split(".")[1] in (layer[0], "common"), f"{path.name} reaches into {text}"
    assert seen >= 5, "the paths are not found any more"


def test_strings_that_functions_import_by_are_whole_paths() -> None:
    """A path that is put together from pieces could be neither looked up nor checked."""
    for path in FILES:
        if path == ROOT / "__init__.py" or path.parent.name == "bench":  # the catalogue and the benches: by their lists
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and name in BY_NAME and path.name != "kernels.py":
                assert isinstance(node.args[0], ast.Constant | ast.Name), f"{path.name}: {ast.unparse(node)}"


def test_the_catalogue_needs_no_triton() -> None:
    assert not [path.name for path in ROOT.glob("*.py") if needs_triton(path)]
    assert needs_triton(ROOT / "t3" / "triton_engine.py"), "Triton is not found any more where it is"


def test_every_module_can_be_imported() -> None:
    has_triton = find_spec("triton") is not None
    for path in FILES:
        if has_triton or not needs_triton(path):
            import_module(module_of(path))


def test_benches_have_one_command_that_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for stage in ("t3", "t3-turbo", "t3-batched", "flow", "vocoder"):
        monkeypatch.setattr(sys, "argv", ["optimizations.bench", stage])
        with pytest.raises(SystemExit, match="CUDA device"):
            import_module("optimizations.bench.__main__").main()
