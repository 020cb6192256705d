"""A combo outside a command: by its name, from a file, or as a mapping.

A file is like those in `configs/combo`: what it switches on, under `optimizations`, and perhaps what it is called,
under `combo`. Reports print their recommendation in that form. A mapping has the same form, or is shorter:

    {"optimizations": {"kv_cache": {"enabled": True, "bucket": 64}}}
    {"kv_cache": {"bucket": 64}, "inference_mode": True}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.errors import UserError
from harness.locations import CONFIGS
from harness.settings import did_you_mean

FILES = CONFIGS / "combo"
SUFFIXES = (".yaml", ".yml")
CUSTOM = "custom"
"""What a combo is called that has no name."""


def read_combo(combo: str | Path | Mapping[str, Any], catalogue: ModuleType) -> tuple[str, dict[str, dict[str, Any]]]:
    """The combo's name, and the parameters of what it switches on, in the order of application.

    Raises UserError for a combo that is not there or cannot be read, and for an optimization or a parameter that the
    catalogue does not know.
    """
    if isinstance(combo, Mapping):
        return _read(combo, "this combo", CUSTOM, catalogue)
    path = combo_file(combo)
    return _read(_content(path), str(path), path.stem, catalogue)


def combo_file(combo: str | Path) -> Path:
    """The file of a combo. Raises UserError for a name that is none of `configs/combo`, or a file that is not there."""
    path = Path(combo)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"there is no file {combo}")
        return path
    known = sorted(file.stem for file in FILES.glob("*.yaml"))
    if str(combo) not in known:
        raise UserError(
            f"there is no combo {str(combo)!r}{did_you_mean(str(combo), known)}; known: {', '.join(known)}; or "
            "name a .yaml file"
        )
    return FILES / f"{combo}.yaml"


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """What a combo's file lists, as it stands there. Raises UserError for one that cannot be read."""
    return dict(_content(path)["optimizations"] or {})


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as a combo ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping) or ("optimizations" not in content and content.keys() - {"combo"}):
        raise UserError(f"{path}: a combo's file lists what it switches on under `optimizations`")
    return {"optimizations": {}, **content}


def _read(
    content: Mapping[str, Any], where: str, name: str, catalogue: ModuleType
) -> tuple[str, dict[str, dict[str, Any]]]:
    if "optimizations" in content:
        if other := content.keys() - {"combo", "optimizations"}:
            raise UserError(f"{where}: has {', '.join(sorted(other))}; a combo has `combo` and `optimizations` alone")
        name, asked, unsaid = str(content.get("combo") or name), content["optimizations"] or {}, False
    else:
        asked, unsaid = content, True
    if not isinstance(asked, Mapping):
        raise UserError(f"{where}: expected names of optimizations with their parameters, and not {asked!r}")
    on: dict[str, dict[str, Any]] = {}
    for optimization, value in ((str(name), value) for name, value in asked.items()):
        if value is not None and not isinstance(value, Mapping | bool):
            raise UserError(f"{where}: {optimization}: expected parameters, true or false, and not {value!r}")
        settings = {"enabled": value} if isinstance(value, bool) else dict(value or {})
        enabled = settings.pop("enabled", unsaid)
        catalogue.create(optimization, settings)
        if enabled:
            on[optimization] = settings
    return name, {known: on[known] for known in catalogue.names() if known in on}
