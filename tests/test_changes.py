"""What a plugin changed and still stands, whatever it says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import optimizations
from harness import checkpoints
from harness.changes import Changeable
from harness.pipeline import Pipeline
from harness.sampling import Sampling


@dataclass
class Thing(Changeable):
    speed: float = 1.0
    part: Any = field(default_factory=lambda: SimpleNamespace(gain=1.0))
    table: dict[str, int] = field(default_factory=lambda: {"a": 1})
    sampling: Sampling = field(default_factory=Sampling)

    def speak(self) -> str:
        return "aloud"


def by(thing: Changeable, name: str, change) -> None:
    with thing.changing(name, home=__name__):
        change(thing)


def test_a_change_is_told_in_words_with_its_maker() -> None:
    thing = Thing()
    by(thing, "fast", lambda t: t.swap(t, "speed", 2.0))
    by(thing, "loud", lambda t: (t.swap(t.part, "gain", 3.0), t.swap_item(t.table, "b", 2)))
    assert thing.standing() == {"fast": ["speed"], "loud": ["SimpleNamespace.gain", "table.b"]}


@pytest.mark.parametrize(
    "nothing",
    [
        lambda t: None,
        lambda t: t.on_undo(lambda: None),
        lambda t: t.swap(t, "speed", 1.0),
        lambda t: t.swap(t, "speak", t.speak),
        lambda t: t.swap(t, "part", t.part),
        lambda t: t.swap(t, "sampling", replace(t.sampling)),
        lambda t: t.swap_item(t.table, "a", 1),
        lambda t: t.wrap(t, "speak", lambda speak: speak),
    ],
)
def test_what_leaves_everything_as_it_was_is_no_change(nothing) -> None:
    thing = Thing()
    by(thing, "idle", nothing)
    assert thing.changes("idle") == []
    assert thing.standing() == {}


def test_what_was_put_back_stands_no_more() -> None:
    thing = Thing()
    by(thing, "wavering", lambda t: (t.swap(t, "speed", 2.0), t.swap(t, "speed", 1.0)))
    assert thing.changes("wavering") == ["speed (2)"]
    assert thing.standing() == {}
    by(thing, "fast", lambda t: t.swap(t, "speed", 2.0))
    thing.speed = 1.0  # behind its back
    assert thing.standing() == {}


def test_what_another_one_took_the_place_of_stands_no_more() -> None:
    thing = Thing()
    by(thing, "first", lambda t: t.swap(t, "speed", 2.0))
    by(thing, "second", lambda t: t.swap(t, "speed", 3.0))
    assert thing.standing() == {"second": ["speed"]}


def test_what_is_wrapped_stands_below() -> None:
    thing = Thing()
    by(thing, "first", lambda t: t.swap(t, "speak", lambda: "softly"))
    by(thing, "second", lambda t: t.wrap(t, "speak", lambda speak: lambda: f"{speak()} and clearly"))
    assert thing.speak() == "softly and clearly"
    assert thing.standing() == {"first": ["speak"], "second": ["speak"]}
    by(thing, "third", lambda t: t.swap(t, "speak", lambda: "not"))
    assert thing.standing() == {"third": ["speak"]}


def test_what_only_the_plugin_knows_of_is_no_change() -> None:
    thing, own, switch = Thing(), SimpleNamespace(on=False), torch.backends.cuda.matmul
    by(thing, "vain", lambda t: (t.swap(own, "on", True), t.swap_item({}, "key", 1), t.swap(Thing, "speed", 9.0)))
    assert thing.standing() == {}
    by(thing, "vain", lambda t: t.swap(t.part, "gain", own))
    assert "SimpleNamespace.on" in thing.standing()["vain"], "now the thing holds it"
    by(thing, "library", lambda t: t.swap(switch, "allow_tf32", not switch.allow_tf32))
    by(thing, "clock", lambda t: t.swap(time, "altzone", 12345))
    assert thing.standing()["library"] == ["cuBLASModule.allow_tf32"]
    assert thing.standing()["clock"] == ["time.altzone"]
    thing.reset()


def test_what_left_with_its_part_stands_no_more() -> None:
    thing = Thing()
    by(thing, "early", lambda t: t.swap(t.part, "gain", 2.0))
    by(thing, "late", lambda t: t.swap(t, "part", SimpleNamespace(gain=1.0)))
    assert thing.standing() == {"late": ["part"]}


def test_a_reset_forgets_all_of_it() -> None:
    thing = Thing()
    by(thing, "fast", lambda t: (t.swap(t, "speed", 2.0), t.swap_item(t.table, "b", 2), t.swap_item(t.table, "a", 3)))
    thing.reset()
    assert (thing.speed, thing.table, thing.standing(), thing.changes("fast")) == (1.0, {"a": 1}, {}, [])


# -- the pipeline's own methods --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline):
    yield loaded
    loaded.reset()


def test_every_way_of_changing_the_pipeline_is_written_down(mini: Pipeline) -> None:
    weight = mini.model.t3.speech_head.weight

    def everything(pipeline: Pipeline) -> None:
        pipeline.replace_stage("join", lambda waves: waves[0], by="all")
        pipeline.wrap_stage("watermark", lambda mark: lambda waves: mark(waves))
        pipeline.enter_around(torch.inference_mode)
        pipeline.call_between(print)
        pipeline.swap(pipeline, "sampling", replace(pipeline.sampling, temperature=0.5))
        pipeline.set_data(weight, weight.data.double())

    by(mini, "all", everything)
    assert mini.standing() == {
        "all": [
            "stages.join",
            "stages.watermark",
            "around inference_mode",
            "between print",
            "sampling",
            "weights in float64",
        ]
    }
    mini.reset()
    assert weight.dtype == torch.float32
    assert mini.standing() == {}


def test_labels_books_and_stages_that_nobody_runs_are_no_change(mini: Pipeline) -> None:
    def idly(pipeline: Pipeline) -> None:
        pipeline.swap(pipeline, "name", "faster")
        pipeline.swap_item(pipeline.stages, "no_such_stage", print)
        pipeline.swap_item(pipeline.replaced_by, "join", "idle")
        pipeline.replace_stage("watermark", pipeline.stages["watermark"], by="idle")
        pipeline.wrap_stage("split_text", lambda stage: stage)
        weight = pipeline.model.t3.speech_head.weight
        pipeline.set_data(weight, weight.data.clone())

    by(mini, "idle", idly)
    assert mini.standing() == {}


def test_numbers_that_were_changed_in_a_weight_are_a_change(mini: Pipeline) -> None:
    weight = mini.model.t3.speech_head.weight
    before = weight.detach().clone()
    by(mini, "pruned", lambda p: p.set_data(weight, torch.where(before.abs() < 0.01, 0.0, before)))
    assert mini.standing() == {"pruned": ["weights in float32"]}
    mini.reset()
    assert torch.equal(weight, before)


def test_getting_ready_is_said_to_be_just_that(mini: Pipeline) -> None:
    by(mini, "early", lambda p: p.rehearse("Yes.", next(iter(p.voices)), seed=0, n_tokens=4))
    assert mini.standing() == {"early": ["utterance rehearsed"]}


PARAMS: dict[str, dict[str, Any]] = {
    "token_sequence": {"target_tokens": 15},
    "warmup": {"levels": 1},
    "channels_last": {"modules": ["vocoder"]},
}


@pytest.mark.parametrize("name", optimizations.APPLIED)
def test_every_optimization_changes_something_of_its_own(mini: Pipeline, name: str) -> None:
    for needed in optimizations.requirements(name, "cpu"):
        by(mini, needed, optimizations.create(needed).apply)
    plugin = optimizations.create(name, PARAMS.get(name))
    if reason := plugin.unavailable(mini):
        pytest.skip(reason)
    by(mini, name, plugin.apply)
    assert mini.standing()[name]


def test_together_none_is_hidden_by_another(mini: Pipeline) -> None:
    """The production combo's and those that can join it on a CPU."""
    names = ("inference_mode", "fused_vocoder", "flow_steps", "int8_weights", "flash_attention", "flat_estimator")
    names += ("channels_last", "alignment_analyzer", "kv_cache", "compile", "token_sequence", "conditioning_cache")
    names += ("gpu_watermark", "batching", "warmup")
    for name in names:
        plugin = optimizations.create(name, PARAMS.get(name, {"estimator": False} if name == "compile" else None))
        assert plugin.unavailable(mini) is None
        by(mini, name, plugin.apply)
    assert set(mini.standing()) == set(names)


def test_a_captured_loop_lets_the_cache_below_it_stand(mini: Pipeline) -> None:
    from optimizations.common.graphs import Uncaptured

    by(mini, "kv_cache", optimizations.create("kv_cache", {"prefix_reuse": False}).apply)
    by(mini, "compile", optimizations.create("compile", {"estimator": False}).apply)
    graphs = optimizations.create("cuda_graphs")
    by(mini, "cuda_graphs", partial(graphs.apply_with, make=Uncaptured))
    assert set(mini.standing()) == {"kv_cache", "compile", "cuda_graphs"}
