"""The second baseline: it changes what it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_cli import composed

import optimizations
from harness import checkpoints
from harness.config import expand
from harness.errors import UserError
from harness.pipeline import Pipeline
from harness.sampling import MULTILINGUAL

TEXT = "It rains today."


@pytest.fixture(scope="module", params=["mini", pytest.param("mini_multilingual", marks=pytest.mark.slow)])
def pipeline(request) -> Pipeline:
    return checkpoints.load(request.param, "cpu")


def spoken(pipeline: Pipeline) -> np.ndarray:
    return pipeline.synthesize(TEXT, "rms", 5, n_tokens=12).wave


def test_attentions_are_not_asked_for_and_what_is_said_is_the_same(pipeline, monkeypatch):
    tfmr, seen = pipeline.model.t3.tfmr, []
    forward = tfmr.forward

    def watched(*args, **kwargs):
        seen.append(kwargs["output_attentions"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(tfmr, "forward", watched)
    before = spoken(pipeline)
    assert set(seen) == {True}
    plugin = optimizations.create("upstream_head")
    with pipeline.changing(plugin.name, home=type(plugin).__module__):
        plugin.apply(pipeline)
    seen.clear()
    np.testing.assert_array_equal(spoken(pipeline), before)
    assert set(seen) == {False}
    shown = plugin.evidence(pipeline)
    assert shown.active
    assert shown.facts["steps_asked_for_attentions_count"] == shown.facts["steps_count"] > 0
    assert pipeline.standing()["upstream_head"]
    pipeline.reset()
    seen.clear()
    spoken(pipeline)
    assert set(seen) == {True}


@pytest.mark.parametrize(("before", "after"), [(2.0, 1.2), (1.5, 1.5)])
def test_only_the_multilingual_classs_own_penalty_becomes_another(before, after):
    pipeline = checkpoints.load("mini_multilingual", "cpu")
    pipeline.sampling = replace(MULTILINGUAL, repetition_penalty=before)
    plugin = optimizations.create("upstream_head")
    plugin.apply(pipeline)
    assert pipeline.sampling == replace(MULTILINGUAL, repetition_penalty=after)
    pipeline.reset()
    assert pipeline.sampling.repetition_penalty == before


def test_beside_a_loop_that_is_not_upstreams_it_was_not_active(pipeline):
    plugins = [optimizations.create(name) for name in ("upstream_head", "kv_cache")]
    for plugin in plugins:
        plugin.apply(pipeline)
    spoken(pipeline)
    shown = plugins[0].evidence(pipeline)
    pipeline.reset()
    assert not shown.active
    assert "leave out" in shown.reason


def test_turbo_is_as_it_was():
    assert "Turbo" in optimizations.create("upstream_head").unavailable(checkpoints.load("tiny_turbo", "cpu"))


def test_a_command_names_it_as_its_baseline():
    (spec,) = expand(composed("+combo=production", "baseline=upstream_head"))
    assert (spec.combo, spec.against, spec.against_toggles) == ("production", "upstream_head", {"upstream_head": {}})
    (usual,) = expand(composed("+combo=production"))
    assert (usual.against, usual.against_toggles) == ("baseline", {})
    (other,) = expand(composed("+combo=production", "baseline=upstream_head", "against=campaign"))
    assert other.against == "campaign"
    with pytest.raises(UserError, match="did you mean upstream_head"):
        expand(composed("+combo=production", "baseline=upstream_hed"))
