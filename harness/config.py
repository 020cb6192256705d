"""From a composed configuration to the jobs it asks for.

The groups' schemas and the catalogue's parameters (`optimizations.<name>.*`) become configuration, and a configuration
becomes one job or, with one of the designs of `harness.designs`, several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from harness import declared
from harness.declared import Catalogue, check_known, check_parameter, check_parameters
from harness.designs import DESIGNS, Design, Job, Subject, single
from harness.devices import has_gpu
from harness.errors import UserError
from harness.locations import CONFIGS
from harness.plugins import has_strangers, import_catalogue
from harness.results import BASELINE, slug
from harness.settings import GROUPS, check, did_you_mean

Toggles = dict[str, dict[str, Any]]
"""Parameters of the enabled optimizations by name, in the order of application."""


NO_PART_OF_A_JOB = (
    *("dry_run", "results_dir", "reports_dir"),
    *("key", "job", "sweep", "over", "runs", "paired_with", "members", "left_out"),
)
"""Settings that say where results go, or how a job came about: its figures do not depend on them."""


@dataclass(frozen=True)
class JobSpec:
    """One paired experiment: what it is called, what it switches on, and its whole resolved configuration.

    `against` is the name of what it is compared with, and `against_toggles` is what that switches on: by default
    nothing, the unmodified pipeline. The two names differ, also as names of files.
    """

    combo: str
    toggles: Toggles
    config: dict[str, Any]
    against: str = BASELINE
    against_toggles: Toggles = field(default_factory=dict)

    @property
    def own_config(self) -> dict[str, Any]:
        """The configuration without what a job's figures do not depend on."""
        return {name: value for name, value in self.config.items() if name not in NO_PART_OF_A_JOB}

    @property
    def config_hash(self) -> str:
        """A short fingerprint of the configuration, whoever asked for the job, and wherever its results go."""
        config = self.own_config
        return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


# -- before composing ----------------------------------------------------------------------------------------


def register_catalogue(overrides: Iterable[str], modules: Iterable[str] = ()) -> None:
    """Make the groups' settings and every optimization's parameters known to Hydra, other people's `modules` included.

    Raises UserError for a plugin that cannot be imported, and for an override of an unknown optimization or parameter.
    """
    catalogue = catalogue_of(modules)
    for override in _parsed(overrides):
        _check_key(catalogue, override.key_or_group)
    node = {name: {"enabled": False, **one.defaults} for name, one in catalogue.items()}
    ConfigStore.instance().store(name="schema", node={**GROUPS, "optimizations": node})


def catalogue_of(modules: Iterable[str] = ()) -> Catalogue:
    """What can be switched on: read from this project's files where nobody else's plugins take part, else imported."""
    if not has_strangers(modules):
        try:
            return declared.read()
        except declared.UnreadableError:
            pass
    return declared.imported(import_catalogue(modules))


def plugin_modules(overrides: Iterable[str]) -> list[str]:
    """Other people's modules that a command names. Raises UserError for anything but a list of names."""
    for override in _parsed(overrides):
        if override.key_or_group == "plugin_modules" and not override.is_sweep_override():
            value = override.value()
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise UserError(f"plugin_modules={value}: give a list, as in [my_package.my_plugin]")
            return value
    return []


def rest_of(overrides: Iterable[str]) -> list[str]:
    """A command's overrides without what only an import of other people's plugins can tell, and without choices."""
    known = {f"optimizations.{name}" for name in catalogue_of()}
    return [
        override.input_line
        for override in _parsed(overrides)
        if not override.is_sweep_override()
        and override.key_or_group != "plugin_modules"
        and (not (key := override.key_or_group).startswith("optimizations.") or ".".join(key.split(".")[:2]) in known)
    ]


def _check_key(catalogue: Catalogue, key: str) -> None:
    """Raises UserError for `optimizations.<name>.<parameter>` where there is no such one."""
    group, *names = key.split(".")
    if group == "optimizations" and names:
        check_known(catalogue, names[0])
        if len(names) == 2 and names[1] != "enabled":
            check_parameter(catalogue[names[0]], names[1])


def _parsed(overrides: Iterable[str]) -> Iterator[Any]:
    """Each override that parses, as Hydra reads it; Hydra itself says what is wrong with the others."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            yield parser.parse_override(text)
        except HydraException:
            continue


# -- after composing -----------------------------------------------------------------------------------------


def expand(cfg: DictConfig) -> list[JobSpec]:
    """The jobs that a configuration asks for: one, or those of a design, or the one of them that `job` names.

    Raises UserError if it asks for none, for a setting out of its range, an unknown optimization or parameter, or two
    optimizations that replace the same stage.
    """
    settings = checked(cfg)
    catalogue = catalogue_of(settings["plugin_modules"])
    combo, sweep = settings["combo"], settings["sweep"]
    toggles = _toggles(catalogue, settings["optimizations"])
    if sweep is None and combo is None and not toggles:
        raise UserError("nothing to measure: name a combo, as in `python run_sweep.py +combo=production`")
    if sweep is not None and settings["against"] is not None:
        raise UserError(f"against={settings['against']}: sweep={sweep} names the references of its jobs; leave it out")
    known = {name: _parameters(settings["optimizations"].get(name, {})) for name in catalogue}
    against, against_toggles = _reference(catalogue, settings["against"])
    subject = _subject(catalogue, str(combo or "custom"), tuple(toggles), settings)
    if sweep is not None:
        settings["members"] = [name for name in toggles if name in subject.members]
        settings["left_out"] = [name for name in toggles or catalogue if name not in subject.members]
    settings["requires"] = {name: list(needs) for name, needs in subject.requires.items() if needs}
    if part := settings["job"]:
        settings |= {"job": None, "key": part["key"]}  # by which its results are found again
    jobs = [_named(part, settings["against"])] if part else _design(sweep)(subject)
    specs = [_job_spec(job, known, against, against_toggles, settings) for job in jobs]
    for spec in specs:
        check_together(catalogue, spec.against_toggles)
        check_together(catalogue, spec.toggles)
    return specs


def _named(job: dict[str, Any], against: str | None) -> Job:
    """A job as the sweeper wrote it down; where the command names a reference, that has its own parameters."""
    if against is not None:
        return Job(job["label"], tuple(job["enabled"]))
    return Job(job["label"], tuple(job["enabled"]), job["against"], tuple(job["reference"]))


def checked(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain data. Raises UserError for a setting out of its range."""
    settings = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    check(settings)
    return settings


def _subject(catalogue: Catalogue, combo: str, enabled: tuple[str, ...], settings: dict[str, Any]) -> Subject:
    exclusive = {
        frozenset((one, other))
        for one, other in combinations(catalogue, 2)
        if set(catalogue[one].replaces) & set(catalogue[other].replaces)
    }
    gpu, known = has_gpu(settings["device"]), tuple(catalogue)
    if settings["sweep"] == "screening" and not gpu:  # each further member takes further sets
        known = tuple(name for name in catalogue if not catalogue[name].only_on_gpu)
        if enabled and not set(enabled) & set(known):
            raise UserError(f"sweep=screening: {', '.join(enabled)} cannot run on a CPU; use device=cuda")
        enabled = tuple(name for name in enabled if name in known)
    requires = {name: one.requirements(gpu) for name, one in catalogue.items()}
    return Subject(
        combo,
        enabled,
        known,
        requires,
        exclusive,
        over=tuple(settings["over"]),
        runs=_runs(settings),
        beside_combo=_beside_combo(settings),
    )


def _runs(settings: dict[str, Any]) -> int | None:
    """Raises UserError for anything but a number, and where it would mean nothing."""
    runs, sweep = settings["runs"], settings["sweep"]
    if runs is None:
        return None
    if sweep not in (None, "screening"):
        raise UserError(f"runs={runs}: only sweep=screening has a number of jobs to choose, sweep={sweep} has its own")
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise UserError(f"runs={runs}: give the number of jobs that the screening has at least, such as 48")
    return runs


def _beside_combo(settings: dict[str, Any]) -> bool:
    """Raises UserError for another choice than the two, and where there is none."""
    partner, sweep = settings["paired_with"], settings["sweep"]
    if partner == BASELINE:
        return False
    if partner != "combo":
        raise UserError(f"paired_with={partner}: give baseline or combo")
    if sweep not in (None, "screening"):
        raise UserError(f"paired_with=combo: only sweep=screening has that choice, sweep={sweep} names its references")
    if settings["combo"] is None:
        raise UserError("paired_with=combo: name the combo, as in +combo=production")
    return True


def _toggles(catalogue: Catalogue, optimizations: dict[str, Any]) -> Toggles:
    """What a configuration's `optimizations` switch on, in the order of application; all of them are known."""
    for name, params in optimizations.items():
        check_known(catalogue, name)
        check_parameters(catalogue[name], _parameters(params))
        if not isinstance(switch := params.get("enabled", False), bool):
            raise UserError(f"optimizations.{name}.enabled={switch}: give true or false")
    chosen = [name for name in catalogue if optimizations.get(name, {}).get("enabled")]
    return {name: _parameters(optimizations[name]) for name in chosen}


def check_together(catalogue: Catalogue, toggles: Toggles) -> None:
    """Raises UserError where two of the optimizations replace the same stage."""
    for one, other in combinations([catalogue[name] for name in toggles], 2):
        for stage in set(one.replaces) & set(other.replaces):
            raise UserError(f"{one.name} and {other.name} both replace the stage {stage}: switch one of them off")


def _parameters(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "enabled"}


def _reference(catalogue: Catalogue, against: str | None) -> tuple[str, Toggles]:
    """The name and the optimizations of the combo that `against` names, as its file has them."""
    if against in (None, BASELINE):
        return BASELINE, {}
    try:
        cfg = _composed([f"combo={against}"])
    except HydraException as error:
        raise UserError(f"against={against}: {explain(error)}") from None
    return str(cfg.combo), _toggles(catalogue, cast(dict[str, Any], OmegaConf.to_container(cfg.optimizations)))


def _composed(overrides: list[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # inside a command, whose search path may have been extended
        return compose("config", overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides)


def _design(name: str | None) -> Design:
    if name is None:
        return single
    if name not in DESIGNS:
        raise UserError(f"unknown sweep {name!r}{did_you_mean(name, DESIGNS)}; known: {', '.join(DESIGNS)}")
    return DESIGNS[name]


def _job_spec(job: Job, known: Toggles, against: str, against_toggles: Toggles, settings: dict[str, Any]) -> JobSpec:
    """`against` is the command's own reference, for a job that names none."""
    toggles = {name: known[name] for name in job.enabled}
    if job.against != BASELINE:
        against, against_toggles = job.against, {name: known[name] for name in job.reference}
    combo = own_name(job.label, toggles, against, against_toggles)
    optimizations = {
        name: {"enabled": name in toggles, **_parameters(params)} for name, params in settings["optimizations"].items()
    }
    config = {**settings, "combo": combo, "against": against, "optimizations": optimizations}
    if against_toggles:
        config["against_optimizations"] = against_toggles
    return JobSpec(combo, toggles, config, against, against_toggles)


def own_name(combo: str, toggles: Toggles, against: str, against_toggles: Toggles) -> str:
    """What a combo is called beside its reference, whose name it may bear, and which no two variants share.

    Identical code against itself is NAME_again; otherwise the difference makes it, as in baseline+kv_cache or
    production-without-warmup. What is called baseline is unmodified, so only the reference may have that name.
    """
    if slug(combo).lower() not in (slug(against).lower(), BASELINE):
        return combo
    if toggles == against_toggles:
        return f"{against}_again"
    like = against_toggles if slug(combo).lower() == slug(against).lower() else {}
    added = [name for name in toggles if name not in like]
    left_out = [name for name in like if name not in toggles]
    if not added and not left_out:
        return f"{combo}_changed" if toggles else "unmodified"
    return combo + _list("+", added) + _list("-without-", left_out)


def _list(sign: str, names: list[str]) -> str:
    """The names behind the sign, or, as file names have an end, how many there are."""
    if len(names) > 3:
        return f"{sign}{len(names)}_optimizations"
    return "".join(f"{sign}{name}" for name in names)


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf says about a command line or a configuration file."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = list(error.options or [])
        return f"there is no {group}={name}{did_you_mean(name, known)}; configs/{group}: {', '.join(known)}"
    where = f"{error.override}:" if isinstance(error, OverrideParseException) else ""
    words = [where, str(error), str(error.__cause__ or "")]
    return " ".join(" ".join(words).split())
