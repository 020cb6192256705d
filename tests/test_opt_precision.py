"""inference_mode, mixed_precision, quantization and flash_attention against the baseline on the miniature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch

from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Pipeline, Utterance
from optimizations.base import Optimization, create
from optimizations.common import modules
from optimizations.common.probe import profile_stages
from optimizations.t3.decoder import decoder_of
from optimizations.t3.engines import StaticEngine

TEXT, SEED, N_TOKENS = "Good morning.", 3, 12
CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 instructions"
)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def baseline(pipeline: Pipeline) -> Utterance:
    return speak(pipeline)


@pytest.fixture(autouse=True)
def _back_to_baseline(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "pipeline" in request.fixturenames:
        request.getfixturevalue("pipeline").reset()


def speak(pipeline: Pipeline, voice: str | None = None) -> Utterance:
    return pipeline.synthesize(TEXT, voice or next(iter(pipeline.voices)), SEED, n_tokens=N_TOKENS)


def apply(pipeline: Pipeline, name: str, **params: object) -> Optimization:
    plugin = create(name, params)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_same(utterance: Utterance, reference: Utterance, tolerance: float = 1e-4) -> None:
    assert [t.tolist() for t in utterance.tokens] == [t.tolist() for t in reference.tokens]
    assert relative_error(utterance.wave, reference.wave) <= tolerance


def mel(pipeline: Pipeline) -> np.ndarray:
    """The flow's mel [80, n] of fixed tokens and fixed noise."""
    voice = next(iter(pipeline.voices.values()))
    tokens = voice.gen["prompt_token"][0, :N_TOKENS].long()
    torch.manual_seed(SEED)
    with torch.inference_mode():
        return pipeline.stages["tokens_to_mel"]([tokens], [voice])[0][0].numpy()


def hidden(pipeline: Pipeline) -> np.ndarray:
    """The last hidden states of T3's transformer for fixed embeddings, as upstream's loop reads them."""
    tfmr = pipeline.model.t3.tfmr
    embeds = torch.randn(2, 20, tfmr.config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        output = tfmr(inputs_embeds=embeds, output_hidden_states=True)
    assert output.hidden_states[-1].dtype == output.last_hidden_state.dtype == torch.float32
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    return output.last_hidden_state.numpy()


def state(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    models = {"t3": pipeline.model.t3, "s3gen": pipeline.model.s3gen}
    return {f"{m}.{key}": t.clone() for m, model in models.items() for key, t in model.state_dict().items()}


@contextmanager
def bit_for_bit(pipeline: Pipeline, baseline: Utterance) -> Iterator[None]:
    """Whatever happens inside, weights and speech are the same bits after a reset."""
    before = state(pipeline)
    yield
    pipeline.reset()
    after = state(pipeline)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert_same(speak(pipeline), baseline, tolerance=0)


# -- parts and surgery ---------------------------------------------------------------------------------------------


def test_every_weight_is_in_exactly_one_part(pipeline: Pipeline) -> None:
    model = pipeline.model
    owners = (model.t3, model.s3gen, model.ve, model.watermarker.perth_net)
    expected = sorted(id(p) for owner in owners for p in owner.parameters())
    assert sorted(id(p) for part in modules.parts(pipeline).values() for p in part.parameters()) == expected


def test_cast_spares_what_it_is_told_to(pipeline: Pipeline, baseline: Utterance) -> None:
    t3 = pipeline.model.t3
    with bit_for_bit(pipeline, baseline):
        modules.cast_parameters(pipeline, t3.tfmr, torch.bfloat16, keep=(t3.tfmr.norm,))
        held = modules.weights(t3.tfmr)
        frequencies = t3.tfmr.rotary_emb.inv_freq.numel() * 2
        assert held["float32"]["count"] == t3.dim + frequencies
        assert held["bfloat16"]["bytes"] == 2 * held["bfloat16"]["count"]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mixed_precision", {"dtype": "bf16"}, "mixed_precision.dtype=bf16: choose one of auto, bfloat16, float16"),
        ("mixed_precision", {"parts": ["t3", "vocoder"]}, "mixed_precision.parts=\\[t3,vocoder\\]"),
        ("quantization", {"strategy": "int8"}, "quantization.strategy=int8: choose one of conservative"),
        ("quantization", {"parts": []}, "quantization.parts="),
        ("flash_attention", {"backend": "flash"}, "flash_attention.backend=flash: choose one of auto"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_choices(name: str, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(name, params)


# -- inference_mode ------------------------------------------------------------------------------------------------


def test_inference_mode_is_lossless_and_covers_every_stage(pipeline: Pipeline, baseline: Utterance) -> None:
    assert not create("inference_mode").evidence(pipeline).active
    with bit_for_bit(pipeline, baseline):
        plugin = apply(pipeline, "inference_mode")
        assert_same(speak(pipeline), baseline)
        evidence = plugin.evidence(pipeline)
        assert evidence.active
        stages = evidence.facts["stages"]
        assert all(facts["autograd_nodes_count"] == 0 for facts in stages.values())
        for stage in ("condition", "generate_tokens", "tokens_to_mel", "mel_to_wave", "join"):
            assert stages[stage]["inference_tensors_count"] == stages[stage]["tensors_count"] > 0


def test_inference_mode_covers_a_reference_clip_and_leaves_nothing_behind(pipeline: Pipeline, tmp_path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.1 * np.random.default_rng(0).standard_normal(24_000 * 2), 24_000)
    reference = speak(pipeline, str(clip))
    apply(pipeline, "inference_mode")
    assert_same(speak(pipeline, str(clip)), reference)
    pipeline.reset()
    assert_same(speak(pipeline, str(clip)), reference, tolerance=0)


# -- mixed_precision -----------------------------------------------------------------------------------------------


@BF16
def test_mixed_precision_halves_the_transformer_and_the_estimator_only(pipeline: Pipeline, baseline: Utterance) -> None:
    reference_mel, reference_hidden = mel(pipeline), hidden(pipeline)
    before = modules.weights_by_part(pipeline)
    with bit_for_bit(pipeline, baseline):
        plugin = apply(pipeline, "mixed_precision", dtype="bfloat16", parts=["t3", "flow"])
        assert np.isfinite(speak(pipeline).wave).all()
        assert 0 < relative_error(mel(pipeline), reference_mel) < 0.05
        assert 0 < relative_error(hidden(pipeline), reference_hidden) < 0.05

        evidence = plugin.evidence(pipeline)
        assert evidence.active
        facts = evidence.facts
        assert facts["logits_dtypes"] == ["float32"]
        assert facts["flow_dtype"] == "float32"
        assert facts["prompt_tokens_unchanged"]
        assert set(facts["weights_now"]) == {"t3_transformer", "flow_estimator"}
        for part, held in facts["weights_now"].items():
            assert modules.n_bytes(held) < 0.65 * modules.n_bytes(before[part])


@BF16
def test_the_solver_integrates_in_float32(pipeline: Pipeline) -> None:
    apply(pipeline, "mixed_precision", parts=["flow"])
    seen = {}
    decoder = pipeline.model.s3gen.flow.decoder
    handle = decoder.estimator.time_mlp.register_forward_pre_hook(lambda _m, args: seen.update(time=args[0].dtype))
    solved = decoder.register_forward_hook(lambda _m, _a, output: seen.update(mel=output[0].dtype))
    mel(pipeline)
    handle.remove()
    solved.remove()
    assert decoder.estimator.dtype == torch.float32
    assert seen == {"time": torch.float32, "mel": torch.float32}


@BF16
@pytest.mark.parametrize("static", [False, True])
def test_mixed_precision_under_the_shared_decoder(pipeline: Pipeline, static: bool) -> None:
    apply(pipeline, "mixed_precision", dtype="bfloat16", parts=["t3", "flow"])
    decoder = decoder_of(pipeline, by="test")
    if static:
        pipeline.swap(decoder, "engine", StaticEngine(pipeline.model.t3.tfmr, bucket=128))
    assert speak(pipeline).n_tokens == N_TOKENS
    assert decoder.logits_dtype == torch.float32


@BF16
def test_mixed_precision_with_upstreams_analyzer() -> None:
    multilingual = checkpoints.load("mini_multilingual", "cpu")
    apply(multilingual, "mixed_precision", dtype="bfloat16", parts=["t3", "flow"])
    assert speak(multilingual).n_tokens == N_TOKENS


# -- quantization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "kinds", "ratio", "error"),
    [
        ("conservative", {"int8": 56}, 0.27, 0.05),
        ("mixed", {"int8": 32, "nf4": 24}, 0.22, 0.3),
        ("aggressive", {"nf4": 56}, 0.15, 0.3),
    ],
)
def test_quantization_replaces_the_transformers_linear_layers(
    pipeline: Pipeline, baseline: Utterance, strategy: str, kinds: dict, ratio: float, error: float
) -> None:
    reference = hidden(pipeline)
    with bit_for_bit(pipeline, baseline):
        plugin = apply(pipeline, "quantization", strategy=strategy)
        assert not plugin.evidence(pipeline).active
        assert 0 < relative_error(hidden(pipeline), reference) < error
        assert np.isfinite(speak(pipeline).wave).all()

        evidence = plugin.evidence(pipeline)
        assert evidence.active
        facts = evidence.facts
        assert facts["linear_layers_replaced_count"] == kinds
        assert facts["linear_layers_called_count"] == 56
        assert facts["linear_layers_now_bytes"] < ratio * facts["linear_layers_before_bytes"]
        assert all(facts["untouched"].values())
        assert facts["parts_now_bytes"]["flow_estimator"] == facts["parts_before_bytes"]["flow_estimator"]


def test_quantization_of_the_flow(pipeline: Pipeline, baseline: Utterance) -> None:
    reference = mel(pipeline)
    with bit_for_bit(pipeline, baseline):
        plugin = apply(pipeline, "quantization", strategy="mixed", parts=["flow"])
        assert 0 < relative_error(mel(pipeline), reference) < 0.3
        facts = plugin.evidence(pipeline).facts
        assert facts["linear_layers_called_count"] == sum(facts["linear_layers_replaced_count"].values())
        for part in ("flow_encoder", "flow_estimator"):
            assert facts["parts_now_bytes"][part] < facts["parts_before_bytes"][part]


@BF16
@pytest.mark.parametrize("strategy", ["conservative", "aggressive"])
@pytest.mark.slow
def test_quantized_weights_survive_the_cast(pipeline: Pipeline, baseline: Utterance, strategy: str) -> None:
    with bit_for_bit(pipeline, baseline):
        quantization = apply(pipeline, "quantization", strategy=strategy, parts=["t3", "flow"])
        precision = apply(pipeline, "mixed_precision", dtype="bfloat16", parts=["t3", "flow"])
        decoder = decoder_of(pipeline, by="test")
        pipeline.swap(decoder, "engine", StaticEngine(pipeline.model.t3.tfmr, bucket=128))
        assert np.isfinite(speak(pipeline).wave).all()
        assert quantization.evidence(pipeline).active
        assert precision.evidence(pipeline).active
        assert modules.compute_dtypes(pipeline) == {"t3": torch.bfloat16, "flow": torch.bfloat16}


# -- flash_attention -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flash_attention_is_lossless_and_saves_the_mask(pipeline: Pipeline, baseline: Utterance) -> None:
    reads = profile_stages(pipeline, ["tokens_to_mel"])["tokens_to_mel"].n_host_reads
    with bit_for_bit(pipeline, baseline):
        plugin = apply(pipeline, "flash_attention")
        assert_same(speak(pipeline), baseline)
        evidence = plugin.evidence(pipeline)
        assert evidence.active
        assert evidence.facts["flow_calls_without_mask_count"] == 2
        for stage in ("generate_tokens", "tokens_to_mel"):
            assert evidence.facts[stage]["kernels_count"][CPU_FLASH] > 0
        assert evidence.facts["tokens_to_mel"]["host_reads_count"] < reads


@pytest.mark.slow
def test_a_padded_batch_keeps_its_mask(pipeline: Pipeline) -> None:
    decoder = pipeline.model.s3gen.flow.decoder
    noise = torch.Generator().manual_seed(SEED)
    mask = torch.ones(2, 1, 24)
    mask[1, :, 16:] = 0
    inputs = {
        "mu": torch.randn(2, 80, 24, generator=noise),
        "cond": torch.zeros(2, 80, 24),
        "spks": torch.randn(2, 80, generator=noise),
        "mask": mask,
        "n_timesteps": 2,
    }

    def flow() -> torch.Tensor:
        torch.manual_seed(SEED)
        with torch.inference_mode():
            return decoder(**inputs)[0]

    reference = flow()
    plugin = apply(pipeline, "flash_attention", backend="sdpa")
    assert torch.equal(flow(), reference)
    evidence = plugin.evidence(pipeline)
    assert evidence.facts["flow_calls_without_mask_count"] == 1  # the probe's own, whose mask is not needed


def test_flash_attn_package_is_asked_for_by_name(pipeline: Pipeline) -> None:
    reason = create("flash_attention", {"backend": "flash_attn"}).unavailable(pipeline)
    assert reason is not None
    assert "sdpa_flash" in reason


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Pipeline:
    return checkpoints.load("random", "cuda")


@pytest.fixture(autouse=True)
def _large_back_to_baseline(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "large" in request.fixturenames:
        request.getfixturevalue("large").reset()


def bits(pipeline: Pipeline) -> dict[str, int]:
    """A sum over the bits of each weight: what has come back is the same, though it may lie elsewhere.

    Where it lies decides which kernel a library chooses, so waves are compared more loosely.
    """
    parameters = {**dict(pipeline.model.t3.named_parameters()), **dict(pipeline.model.s3gen.named_parameters())}
    return {name: int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for name, p in parameters.items()}


@pytest.mark.gpu
def test_gpu_flash_needs_half_precision_and_then_runs(large: Pipeline) -> None:
    assert "mixed_precision" in (create("flash_attention").unavailable(large) or "")
    apply(large, "mixed_precision")
    plugin = apply(large, "flash_attention")
    speak(large)
    evidence = plugin.evidence(large)
    assert evidence.active, evidence
    for stage in ("generate_tokens", "tokens_to_mel"):
        assert any("flash" in kernel for kernel in evidence.facts[stage]["kernels_count"]), evidence


@pytest.mark.gpu
def test_gpu_dropping_the_mask_is_lossless_in_float32(large: Pipeline) -> None:
    reference = speak(large)
    plugin = apply(large, "flash_attention", backend="sdpa")
    assert_same(speak(large), reference, tolerance=1e-3)
    assert plugin.evidence(large).active


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gpu_mixed_precision_saves_memory_and_comes_back(large: Pipeline, dtype: str) -> None:
    before, reference, full = bits(large), speak(large), torch.cuda.memory_allocated()
    plugin = apply(large, "mixed_precision", dtype=dtype)
    assert np.isfinite(speak(large).wave).all()
    assert torch.cuda.memory_allocated() < full - 1_000_000_000
    evidence = plugin.evidence(large)
    assert evidence.facts["logits_dtypes"] == ["float32"]
    assert evidence.facts["prompt_tokens_unchanged"]
    assert evidence.facts["tf32"]
    large.reset()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert bits(large) == before
    assert_same(speak(large), reference, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("strategy", ["conservative", "mixed", "aggressive"])
def test_gpu_quantization(large: Pipeline, strategy: str, precision: str | None) -> None:
    before, reference, full = bits(large), speak(large), torch.cuda.memory_allocated()
    plugin = apply(large, "quantization", strategy=strategy, parts=["t3", "flow"])
    if precision:
        apply(large, "mixed_precision", dtype=precision)
    assert np.isfinite(speak(large).wave).all()
    assert torch.cuda.memory_allocated() < full - 1_200_000_000
    assert plugin.evidence(large).active
    large.reset()
    assert bits(large) == before
    assert_same(speak(large), reference, tolerance=1e-5)


@pytest.mark.gpu
def test_gpu_inference_mode(large: Pipeline) -> None:
    reference = speak(large)
    plugin = apply(large, "inference_mode")
    assert_same(speak(large), reference)
    assert plugin.evidence(large).active
