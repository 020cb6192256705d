"""From a composed configuration to the jobs it asks for.

The catalogue's parameters become configuration (`optimizations.<name>.*`), and a configuration becomes one
job or, with one of the designs of `harness.ablation`, several.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from types import ModuleType
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from harness.ablation import DESIGNS, Design, Job
from harness.errors import UserError
from harness.plugins import import_catalogue

BASELINE_AGAIN = "baseline_again"
"""The name of a combo without optimizations: identical code against itself, which shows the noise floor."""

Toggles = dict[str, dict[str, Any]]
"""Parameters of the enabled optimizations by name, in the order of application."""


@dataclass(frozen=True)
class JobSpec:
    """One paired experiment: what it is called, what it switches on, and its whole resolved configuration."""

    combo: str
    toggles: Toggles
    config: dict[str, Any]

    @property
    def config_hash(self) -> str:
        """A short fingerprint of the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:12]


# -- before composing ----------------------------------------------------------------------------------------


def register_catalogue(overrides: Iterable[str]) -> None:
    """Make every optimization's parameters known to Hydra, those of `plugin_modules=[...]` included.

    Raises UserError for a plugin that cannot be imported, and for an override of an unknown optimization.
    """
    values = dict(_parsed(overrides))
    catalogue = import_catalogue(values.get("plugin_modules") or [])
    for key in values:
        if key.startswith("optimizations.") and (name := key.split(".")[1]) not in catalogue.names():
            catalogue.create(name)  # raises, and says which name was meant
    node = {name: {"enabled": False, **asdict(cls.Config())} for name, cls in catalogue.CATALOGUE.items()}
    ConfigStore.instance().store(name="catalogue", node={"optimizations": node})


def _parsed(overrides: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Key and value of each override that parses; Hydra itself says what is wrong with the others."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            yield override.key_or_group, None if override.is_sweep_override() else override.value()
        except HydraException:
            continue


# -- after composing -----------------------------------------------------------------------------------------


def expand(cfg: DictConfig) -> list[JobSpec]:
    """The jobs that a configuration asks for.

    Raises UserError if it asks for none, names an unknown optimization or parameter, or switches on two
    optimizations that replace the same stage.
    """
    catalogue = import_catalogue(cfg.plugin_modules)
    settings = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    known = catalogue.names()
    for name in settings["optimizations"]:
        catalogue.create(name)
    parameters = {name: dict(settings["optimizations"].get(name, {})) for name in known}
    enabled = [name for name in known if parameters[name].pop("enabled", False)]
    combo = settings["combo"]
    if settings["sweep"] is None and combo is None and not enabled:
        raise UserError("nothing to measure: name a combo, as in `python run_sweep.py +combo=production`")
    design = _design(settings["sweep"])
    return [
        _job_spec(catalogue, label, {name: parameters[name] for name in chosen}, settings)
        for label, chosen in design(combo or "custom", enabled, known)
    ]


def _single(combo: str, enabled: list[str], _known: list[str]) -> list[Job]:
    return [(combo if enabled else BASELINE_AGAIN, enabled)]


def _design(name: str | None) -> Design:
    if name is None:
        return _single
    if name not in DESIGNS:
        raise UserError(f"unknown sweep {name!r}{did_you_mean(name, DESIGNS)}; known: {', '.join(DESIGNS)}")
    return DESIGNS[name]


def _job_spec(catalogue: ModuleType, combo: str, toggles: Toggles, settings: dict[str, Any]) -> JobSpec:
    plugins = [catalogue.create(name, params) for name, params in toggles.items()]
    for one, other in combinations(plugins, 2):
        for stage in set(one.replaces) & set(other.replaces):
            raise UserError(f"{one.name} and {other.name} both replace the stage {stage}: switch one of them off")
    optimizations = {
        name: {"enabled": name in toggles, **{k: v for k, v in params.items() if k != "enabled"}}
        for name, params in settings["optimizations"].items()
    }
    return JobSpec(combo, toggles, {**settings, "combo": combo, "optimizations": optimizations})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint in brackets, empty where nothing known is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf says about a command line or a configuration file."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = list(error.options or [])
        return f"there is no {group}={name}{did_you_mean(name, known)}; configs/{group}: {', '.join(known)}"
    where = f"{error.override}:" if isinstance(error, OverrideParseException) else ""
    words = [where, str(error), str(error.__cause__ or "")]
    return " ".join(" ".join(words).split())
