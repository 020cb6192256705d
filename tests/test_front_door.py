"""The front door: what a command may say, what is refused before anything loads, and in which words."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import yaml
from conftest import ROOT
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_cli import composed

from harness.config import expand, own_name
from harness.errors import UserError
from harness.settings import GROUPS, check

# -- names and types are Hydra's to check, ranges ours ---------------------------------------------------------------

REFUSED_BY_HYDRA = [
    "measure.min_rounds=many",
    "measure.min_rounds=2.5",
    "measure.min_rounds=null",
    "measure.min_round=3",
    "measure.thresholds.rtf=tiny",
    "measure.thresholds.wear=0.1",
    "workload.seeds=7",
    "workload.voices=null",
    "pipeline.threads=some",
    "quality.asr=[whisper]",
    "gate.limits=null",
]


@pytest.mark.parametrize("override", REFUSED_BY_HYDRA)
def test_a_wrong_name_or_type_does_not_compose(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed("+combo=production", override)


OUT_OF_RANGE = [
    *("measure.min_rounds=0", "measure.max_rounds=3", "measure.budget_s=-5", "measure.budget_s=nan"),
    *("measure.budget_s=inf", "measure.processes=0", "measure.warmup_calls=-1", "measure.pinned_tokens=0"),
    *("measure.pinned_tokens=1001", "measure.tokens_per_character=0", "measure.load_limit_s=0"),
    *("measure.call_limit_s=-1", "measure.offline_baseline_items=0", "pipeline.threads=0", "pipeline.seed=-1"),
    *(f"measure.thresholds.{name}={value}" for name in ("rtf", "wer") for value in ("nan", "inf", "0", "-0.1")),
    *("+measure.rounds=3", "+workload.foo=1", "+gate.limit=3"),
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_setting_out_of_its_range_is_one_line_that_names_it(override):
    with pytest.raises(UserError) as error:
        expand(composed("+combo=production", override))
    assert override.lstrip("+").split("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["measure.budget_s=0", "measure.pinned_tokens=1000", "measure.warmup_calls=0"])
def test_the_ends_of_a_range_are_in_it(override):
    expand(composed("+combo=production", override))


@pytest.mark.parametrize("group", GROUPS)
def test_the_default_of_a_group_says_every_setting_and_nothing_else(group):
    """So that what a setting is for can be read beside it."""
    default = {"pipeline": "mini", "workload": "offline"}.get(group, "default")
    said = yaml.safe_load((ROOT / f"configs/{group}/{default}.yaml").read_text())
    assert set(said) == {field.name for field in fields(GROUPS[group])}


@pytest.mark.parametrize("schema", GROUPS.values())
def test_every_number_has_a_range(schema):
    """A number that nobody bounds is one that somebody sets to -5."""
    for one in [field.type for field in fields(schema)]:
        assert not is_dataclass(one)
    numbers = [field for field in fields(schema) if str(field.type).split(" ")[0] in ("int", "float")]
    assert all("range" in field.metadata for field in numbers)


def test_a_check_needs_no_hydra():
    settings = OmegaConf.to_container(composed("+combo=production"))
    settings["measure"]["budget_s"] = float("nan")
    with pytest.raises(UserError, match=r"measure\.budget_s=nan: give a number of 0 or more"):
        check(settings)


# -- combos and their names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["combo=production", "+combo=production", "++combo=production"])
def test_both_spellings_of_a_combo_do(spelling):
    (spec,) = expand(composed(spelling))
    assert spec.combo == "production"
    assert len(expand(composed(spelling, "sweep=leave_one_out"))) == len(
        expand(composed(spelling, "+sweep=leave_one_out"))
    )


def test_a_baseline_with_something_on_has_a_name_of_its_own():
    (spec,) = expand(composed("+combo=baseline", "optimizations.kv_cache.enabled=true"))
    assert (spec.combo, spec.against) == ("baseline+kv_cache", "baseline")
    assert list(spec.toggles) == ["kv_cache"]


def test_a_combo_can_be_compared_with_another_one_as_its_file_has_it():
    (spec,) = expand(composed("+combo=min_vram", "against=production", "optimizations.kv_cache.bucket=32"))
    (production,) = expand(composed("+combo=production"))
    assert (spec.combo, spec.against) == ("min_vram", "production")
    assert spec.against_toggles == production.toggles
    assert spec.toggles["kv_cache"]["bucket"] == 32
    assert spec.config["against"] == "production"
    assert spec.config["against_optimizations"] == production.toggles


@pytest.mark.parametrize("unmodified", [[], ["against=null"], ["against=baseline"]])
def test_without_a_word_it_is_compared_with_the_unmodified_pipeline(unmodified):
    (spec,) = expand(composed("+combo=production", *unmodified))
    assert (spec.against, spec.against_toggles) == ("baseline", {})


def test_an_unknown_reference_is_named_with_the_nearest_combo():
    with pytest.raises(UserError, match=r"against=produktion.*did you mean production"):
        expand(composed("+combo=baseline", "against=produktion"))


KV, WARM = {"kv_cache": {"bucket": 256}}, {"warmup": {"levels": 2}}
NAMES = [
    (("mine", KV, "baseline", {}), "mine"),
    (("baseline", {}, "baseline", {}), "baseline_again"),
    (("baseline", KV, "baseline", {}), "baseline+kv_cache"),
    (("Baseline", KV, "baseline", {}), "Baseline+kv_cache"),  # one folder on some file systems
    (("baseline.", KV, "baseline", {}), "baseline.+kv_cache"),  # one folder on all: the dot is dropped
    (("baseline", {}, "production", KV), "unmodified"),
    (("baseline", KV, "production", KV), "production_again"),
    (("production", KV, "production", KV), "production_again"),
    (("production", KV | WARM, "production", KV), "production+warmup"),
    (("production", KV, "production", KV | WARM), "production-without-warmup"),
    (("production", {"kv_cache": {"bucket": 8}}, "production", KV), "production_changed"),
    (("baseline", {name: {} for name in "abcd"}, "baseline", {}), "baseline+4_optimizations"),
]


@pytest.mark.parametrize(("arguments", "name"), NAMES)
def test_no_two_variants_share_a_name(arguments, name):
    assert own_name(*arguments) == name
