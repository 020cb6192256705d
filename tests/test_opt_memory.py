"""The plugins about memory and about the first call: cuda_cache, cpu_offload, warmup."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import nn

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Pipeline, Segment
from optimizations import cuda_cache
from optimizations.common.graphs import Uncaptured
from optimizations.cpu_offload import Group, Meter

TEXT = "Good morning, how are you today?"
N_TOKENS = 5
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def baseline(mini):
    return speak(mini)


@pytest.fixture(autouse=True)
def _reset(mini):
    yield
    mini.reset()


def speak(pipeline, voice=None, n_tokens=N_TOKENS):
    return pipeline.synthesize(TEXT, voice or next(iter(pipeline.voices)), seed=5, n_tokens=n_tokens)


def applied(pipeline, name, **params):
    plugin = optimizations.create(name, params)
    plugin.apply(pipeline)
    return plugin


def assert_same(utterance, reference):
    assert torch.equal(utterance.tokens[0], reference.tokens[0])
    np.testing.assert_array_equal(utterance.wave, reference.wave)


def assert_close(utterance, reference):
    """On a GPU, where cuDNN need not repeat itself to the bit."""
    assert torch.equal(utterance.tokens[0], reference.tokens[0])
    assert np.linalg.norm(utterance.wave - reference.wave) < 1e-4 * np.linalg.norm(reference.wave)


# -- cuda_cache ----------------------------------------------------------------------------------------------------


def test_cuda_cache_needs_cuda_and_says_so(mini):
    assert "device=cuda" in optimizations.create("cuda_cache").unavailable(mini)


def test_cuda_cache_asks_for_expandable_segments_before_cuda_starts():
    variables = optimizations.create("cuda_cache").environment()
    assert set(variables) == {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    assert set(variables.values()) == {"expandable_segments:True"}


@pytest.mark.parametrize(
    ("profile", "unused", "emptied"),
    [
        ("conservative", 0.9, 0),
        ("balanced", 0.9, 1),
        ("balanced", 0.1, 0),
        ("aggressive", 0.1, 1),
    ],
)
def test_cuda_cache_profiles_differ_in_when_they_empty_the_cache(mini, baseline, monkeypatch, profile, unused, emptied):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(cuda_cache, "usage", lambda _device: {"unused_share": unused, "driver_allocations_count": 0})
    settings = {"allocator_settings": {"expandable_segments": True, "max_split_size": -1}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda _device: settings)
    plugin = applied(mini, "cuda_cache", profile=profile)
    assert_same(speak(mini), baseline)
    assert len(calls) == emptied
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["empty_cache_calls_count"] == emptied
    json.dumps(evidence.facts)
    settings["allocator_settings"]["expandable_segments"] = False
    assert "PYTORCH_ALLOC_CONF" in plugin.evidence(mini).reason
    mini.reset()
    speak(mini)
    assert len(calls) == emptied


def test_cuda_cache_knows_its_profiles(mini):
    with pytest.raises(UserError, match="conservative, balanced, aggressive"):
        applied(mini, "cuda_cache", profile="bold")


def test_unused_share_of_nothing_is_nothing():
    assert cuda_cache.unused_share(0, 0) == 0
    assert cuda_cache.unused_share(60, 80) == pytest.approx(0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", cuda_cache.PROFILES)
def test_cuda_cache_on_the_gpu(profile):
    pipeline = checkpoints.load("mini", "cuda")
    before = speak(pipeline)
    plugin = applied(pipeline, "cuda_cache", profile=profile)
    assert_close(speak(pipeline), before)
    evidence = plugin.evidence(pipeline)
    assert evidence.facts["allocator"] == "native"
    assert isinstance(evidence.facts["settings"]["expandable_segments"], bool)
    assert evidence.active == evidence.facts["settings"]["expandable_segments"]
    assert evidence.facts["after"]["reserved_bytes"] >= evidence.facts["after"]["allocated_bytes"] > 0
    assert evidence.facts["empty_cache_calls_count"] == 1 or profile != "aggressive"
    json.dumps(evidence.facts)


# -- cpu_offload ---------------------------------------------------------------------------------------------------
# A pipeline on the CPU says `unavailable`; applied all the same, it moves its weights from the CPU to the CPU,
# through the same code and with real copies.


@pytest.mark.parametrize("profile", ["conditioning", "sequential"])
def test_cpu_offload_is_unavailable_on_the_cpu(mini, profile):
    assert "device=cuda" in optimizations.create("cpu_offload", {"profile": profile}).unavailable(mini)


def test_cpu_offload_knows_its_profiles(mini):
    with pytest.raises(UserError, match="conditioning, sequential"):
        applied(mini, "cpu_offload", profile="everything")


def test_conditioning_stays_away_for_built_in_voices(mini, baseline):
    plugin = applied(mini, "cpu_offload", pinned=False)
    assert_same(speak(mini), baseline)
    facts = plugin.evidence(mini).facts
    assert facts["bytes_to_device"] == 0
    assert facts["bytes_to_host"] == facts["group_bytes"]["conditioning"] > 0
    assert set(facts["device_by_stage"]) == set(mini.stages)
    json.dumps(facts)
    mini.reset()
    assert_same(speak(mini), baseline)


def test_conditioning_comes_back_for_a_reference_clip(mini, tmp_path):
    clip = tmp_path / "clip.wav"
    rng = np.random.default_rng(0)
    soundfile.write(clip, 0.1 * rng.standard_normal(24_000), 24_000)
    before = speak(mini, voice=str(clip), n_tokens=4)
    plugin = applied(mini, "cpu_offload", pinned=False)
    assert_same(speak(mini, voice=str(clip), n_tokens=4), before)
    facts = plugin.evidence(mini).facts
    assert facts["bytes_to_device"] == facts["group_bytes"]["conditioning"]
    assert facts["moves_count"] == 3  # away, in, away again
    assert "condition_with_reference_clip" in facts["device_by_stage"]
    mini.reset()
    assert "prepare_conditionals" not in vars(mini.model)


def test_sequential_has_t3_flow_and_vocoder_take_turns(mini, baseline):
    plugin = applied(mini, "cpu_offload", profile="sequential", pinned=False)
    groups, seen = plugin._groups, {}
    mini.call_between(lambda stage: seen.update({stage: {name: group.is_away for name, group in groups.items()}}))
    for _ in range(2):
        assert_same(speak(mini), baseline)
        for stage, here in (("generate_tokens", "t3"), ("tokens_to_mel", "flow"), ("mel_to_wave", "vocoder")):
            assert [name for name, away in seen[stage].items() if not away] == [here]
    facts = plugin.evidence(mini).facts
    sizes = facts["group_bytes"]
    assert facts["bytes_to_device"] == 2 * (sizes["t3"] + sizes["flow"] + sizes["vocoder"])
    assert facts["bytes_to_host"] == sum(sizes.values())  # once: weights do not change
    mini.reset()
    assert not any(group.is_away for group in groups.values())
    assert_same(speak(mini), baseline)


@pytest.mark.parametrize("decoder", ["kv_cache", "alignment_analyzer"])
def test_sequential_serves_every_decode_loop(mini, decoder):
    applied(mini, decoder)
    before = speak(mini)
    plugin = applied(mini, "cpu_offload", profile="sequential", pinned=False)
    assert_same(speak(mini), before)
    # A stage called on its own, as other plugins' evidence does, fetches what it needs as well.
    segment_voice = mini.stages["condition"](next(iter(mini.voices)))
    assert plugin._groups["t3"].is_away
    mini.stages["generate_tokens"]([Segment(TEXT, segment_voice, 0, 2)])
    assert not plugin._groups["t3"].is_away


def test_the_device_is_the_pipelines_while_weights_are_away(mini):
    s3gen = mini.model.s3gen
    cls = type(s3gen)
    applied(mini, "cpu_offload", profile="sequential", pinned=False)
    assert s3gen.device == mini.device == mini.model.t3.device
    assert isinstance(s3gen, cls)
    mini.reset()
    assert type(s3gen) is cls


def test_a_group_moves_by_copies_that_stay_good():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    home = module[0].weight.data_ptr()
    meter = Meter(CPU)
    group = Group((module, module[0]), CPU, pinned=False, meter=meter)
    assert group.n_bytes == sum(tensor.nbytes for tensor in before.values())  # nothing twice
    group.bring()
    assert meter.n_moves == 0
    with torch.inference_mode():
        group.send()
        group.send()
        waiting = module[0].weight.data_ptr()
        assert waiting != home
        group.bring()
        assert module[0].weight.data_ptr() != waiting
        group.send()
        assert module[0].weight.data_ptr() == waiting
        group.bring()
    assert not module[0].weight.is_inference()
    assert meter.n_moves == 4
    assert (meter.bytes_to_host, meter.bytes_to_device) == (group.n_bytes, 2 * group.n_bytes)
    assert meter.seconds > 0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def quantize(pipeline, strategy):
    pytest.importorskip("bitsandbytes")
    return applied(pipeline, "quantization", strategy=strategy)


@pytest.mark.slow
def test_sequential_refuses_int8_layers(mini, monkeypatch):
    quantize(mini, "conservative")
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    reason = optimizations.create("cpu_offload", {"profile": "sequential"}).unavailable(mini)
    assert "T3" in reason
    assert "profile=conditioning" in reason
    assert optimizations.create("cpu_offload").unavailable(mini) is None


def test_sequential_refuses_captured_weights(mini, monkeypatch):
    optimizations.create("cuda_graphs", {"tokens": 8}).apply_with(mini, Uncaptured)
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    assert "cuda_graphs" in optimizations.create("cpu_offload", {"profile": "sequential"}).unavailable(mini)
    assert optimizations.create("cpu_offload").unavailable(mini) is None


def test_sequential_moves_4_bit_layers(mini, monkeypatch):
    quantize(mini, "aggressive")
    applied(mini, "kv_cache")
    before = speak(mini)  # also lets the layers settle into the layout that this CPU's kernels want
    with monkeypatch.context() as patch:
        patch.setattr(mini, "device", torch.device("cuda"))
        assert optimizations.create("cpu_offload", {"profile": "sequential"}).unavailable(mini) is None
    plugin = applied(mini, "cpu_offload", profile="sequential", pinned=False)
    group, layer = plugin._groups["t3"], mini.model.t3.tfmr.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    group.bring()
    home = layer.weight.data_ptr()
    group.send()
    assert layer.weight.data_ptr() != home
    assert_same(speak(mini), before)
    assert plugin._meter.n_moves > 3


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["conditioning", "sequential"])
@pytest.mark.parametrize("decoder", [None, "kv_cache"])
def test_cpu_offload_on_the_gpu_at_full_size(profile, decoder, tmp_path):
    pipeline = checkpoints.load("random", "cuda")
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.1 * np.random.default_rng(0).standard_normal(48_000), 24_000)
    if decoder:
        applied(pipeline, decoder)
    before = [speak(pipeline), speak(pipeline, voice=str(clip))]
    held = torch.cuda.memory_allocated()
    plugin = applied(pipeline, "cpu_offload", profile=profile)
    assert held - torch.cuda.memory_allocated() > 500e6
    for _ in range(2):
        assert_close(speak(pipeline), before[0])
        assert_close(speak(pipeline, voice=str(clip)), before[1])
    evidence = plugin.evidence(pipeline)
    assert evidence.active
    places = evidence.facts["device_by_stage"]
    assert places["tokens_to_mel"]["conditioning"] == "cpu"
    assert places["condition_with_reference_clip"]["conditioning"].startswith("cuda")
    if profile == "sequential":
        assert places["generate_tokens"]["flow"] == places["mel_to_wave"]["t3"] == "cpu"
    assert evidence.facts["host_copies_pinned"]
    pipeline.reset()
    assert_close(speak(pipeline), before[0])


@pytest.mark.gpu
def test_min_vram_takes_a_quarter_of_the_memory():
    """The plugins of `+combo=min_vram` on 10 s of speech; peaks as the harness reads them, loading left out."""
    pytest.importorskip("bitsandbytes")
    pipeline = checkpoints.load("random", "cuda")
    upstream = peak_mb(pipeline)
    combo = yaml.safe_load((ROOT / "configs/combo/min_vram.yaml").read_text())["optimizations"]
    for name in optimizations.names():
        if combo.get(name, {}).get("enabled"):
            applied(pipeline, name, **{key: value for key, value in combo[name].items() if key != "enabled"})
    small, stages = peak_mb(pipeline), {}
    pipeline.call_between(lambda stage: stages.update({stage: torch.cuda.max_memory_allocated() / 1e6}))
    peak_mb(pipeline)
    print(f"\npeak allocated: upstream {upstream:.0f} MB, min_vram {small:.0f} MB ({small / upstream:.1%})")
    print(f"highest until the end of each stage: { {name: round(mb) for name, mb in stages.items()} }")
    assert small <= 0.25 * upstream


def peak_mb(pipeline):
    """Of the second call of 250 speech tokens."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        spoken = speak(pipeline, n_tokens=250)
    assert np.isfinite(spoken.wave).all()
    return torch.cuda.max_memory_allocated() / 1e6


# -- warmup --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_warmup_changes_nothing_but_the_first_call(mini, baseline):
    conditionals, rng = mini.model.conds, torch.get_rng_state()
    plugin = applied(mini, "warmup", levels=2, shapes=[4, 3])
    assert torch.equal(torch.get_rng_state(), rng)
    assert mini.model.conds is conditionals
    assert_same(speak(mini), baseline)
    evidence = plugin.evidence(mini)
    assert evidence.active
    facts = evidence.facts
    assert list(facts["first_s_by_tokens"]) == ["3", "4"]
    assert facts["tokens_in_that_call_count"] == 3
    assert facts["first_call_s"] > 0
    assert facts["later_call_s"] > 0
    json.dumps(facts)


@pytest.mark.parametrize(("levels", "shapes"), [(1, [3]), ([1], [3]), (2, [3, 5]), ([2], [3, 5])])
def test_warmup_levels(mini, monkeypatch, levels, shapes):
    spoken = []

    def synthesize(_text, _voice, seed, n_tokens):
        spoken.append(n_tokens)
        return SimpleNamespace(generation_time_s=0.1)

    monkeypatch.setattr(mini, "synthesize", synthesize)
    applied(mini, "warmup", levels=levels, shapes=[5, 3])
    assert spoken == shapes


def test_warmup_prepares_stages_that_offer_it(mini):
    class Prepared:
        n_prepared = 0

        def __init__(self, stage):
            self.stage = stage

        def __call__(self, *args):
            return self.stage(*args)

        def prepare(self):
            self.n_prepared += 1

    mini.wrap_stage("tokens_to_mel", Prepared)
    plugin = applied(mini, "warmup", levels=1, shapes=[2])
    assert mini.stages["tokens_to_mel"].n_prepared == 1
    assert plugin.evidence(mini).facts["stages_prepared"] == ["tokens_to_mel"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"levels": 3}, "from 1 to 2"),
        ({"levels": 0}, "from 1 to 2"),
        ({"levels": [1, 5]}, "from 1 to 2"),
        ({"shapes": []}, "from 1 to 1000"),
        ({"shapes": [0]}, "from 1 to 1000"),
        ({"shapes": [2000]}, "from 1 to 1000"),
    ],
)
def test_warmup_checks_its_parameters(mini, params, message):
    with pytest.raises(UserError, match=message):
        applied(mini, "warmup", **params)


def test_warmup_needs_a_voice(mini, monkeypatch):
    monkeypatch.setattr(mini, "voices", {})
    assert "voice" in optimizations.create("warmup").unavailable(mini)


COLD = """
import json, torch, optimizations
from harness import checkpoints
pipeline = checkpoints.load("mini", "cuda")
rng = torch.cuda.get_rng_state()
plugin = optimizations.create("warmup", {"shapes": [8]})
plugin.apply(pipeline)
assert torch.equal(torch.cuda.get_rng_state(), rng)
print(json.dumps(plugin.evidence(pipeline).facts))
"""


@pytest.mark.gpu
def test_warmup_takes_the_cold_start_of_a_fresh_process():
    run = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=True, cwd=ROOT)
    facts = json.loads(run.stdout.splitlines()[-1])
    assert facts["later_call_s"] < facts["first_call_s"]
