"""The flat encoder as a plugin: every way to the encoder leads to its kernels, for which upstream's layers stand."""

from collections import Counter
from copy import copy
from types import SimpleNamespace

import pytest
import torch
from applied import apply_one, apply_one_uncaptured
from chatterbox.models.s3gen.transformer.embedding import RelPositionalEncoding
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import optimizations
from harness import checkpoints
from optimizations.common.probe import Profile
from optimizations.flow.static_shape import OWN_WAY, encode

NAMES = ("a_product", "an_attention")


@pytest.fixture(scope="module")
def pipeline():
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(pipeline):
    yield pipeline
    pipeline.reset()


class Layers:
    """In the place of `TritonEncoder`."""

    def __init__(self, encoder, precision):
        self.layers, self.precision, self.n_calls = copy(encoder), precision, 0

    def encode(self, embedded, lengths):
        self.n_calls += 1
        return encode(self.layers, embedded, lengths)

    def forward(self, xs, xs_lens, *_chunks):
        hidden = self.encode(xs, xs_lens)
        return hidden, torch.ones(len(xs), 1, hidden.shape[1], dtype=torch.bool)


@pytest.fixture
def stand_in(monkeypatch):
    """Has the plugin take `Layers`, and a probe see the kernels that `seen` counts."""
    precision = SimpleNamespace(dtype=torch.float16)
    kernels = SimpleNamespace(
        NAMES=NAMES, unsupported=lambda _: None, allowed=lambda: precision, TritonEncoder=Layers, seen=Counter(NAMES)
    )
    monkeypatch.setattr("optimizations.flat_encoder.for_device", lambda *_: kernels)
    profiled = {"tokens_to_mel": Profile(Counter(), kernels.seen)}
    monkeypatch.setattr("optimizations.flat_encoder.profile_stages", lambda *_: profiled)
    return kernels


def mels(pipeline):
    """Two segments of different length."""
    voice = pipeline.stages["condition"](next(iter(pipeline.voices)))
    torch.manual_seed(0)
    with torch.inference_mode():
        return pipeline.stages["tokens_to_mel"]([torch.arange(n) * 40 for n in (20, 12)], [voice] * 2)


@pytest.mark.parametrize("other", ["inference_mode", "cuda_graphs", "batching"])
def test_every_way_to_the_encoder_leads_to_it(mini, stand_in, other):
    before, upstream = mels(mini), mini.model.s3gen.flow.encoder.forward
    plugin = apply_one(mini, "flat_encoder")
    apply_one_uncaptured(mini, other)
    for mel, expected in zip(mels(mini), before, strict=True):
        torch.testing.assert_close(mel, expected, atol=1e-3, rtol=1e-4)
    assert plugin.evidence(mini).facts["encoder_calls_count"] == (1 if other == "batching" else 2)
    mini.reset()
    assert mini.model.s3gen.flow.encoder.forward == upstream
    assert OWN_WAY not in vars(mini.model.s3gen.flow.encoder)
    assert all(torch.equal(mel, expected) for mel, expected in zip(mels(mini), before, strict=True))


def test_what_captures_does_not_hide_it(mini, stand_in):
    with mini.changing("flat_encoder", "optimizations.flat_encoder"):
        apply_one(mini, "flat_encoder")
    with mini.changing("cuda_graphs", "optimizations.cuda_graphs"):
        apply_one_uncaptured(mini, "cuda_graphs")
    assert mini.standing()["flat_encoder"] == [OWN_WAY]


def test_its_kernels_are_the_evidence(mini, stand_in):
    plugin = apply_one(mini, "flat_encoder")
    mels(mini)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts == {
        "encoder_calls_count": 2,
        "operands_dtype": "float16",
        "triton_kernels_count": dict.fromkeys(NAMES, 1),
    }
    del stand_in.seen["an_attention"]
    evidence = plugin.evidence(mini)
    assert not evidence.active
    assert evidence.reason == "a probe did not see the kernels an_attention"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_it_needs_a_gpu(mini, monkeypatch, device):
    monkeypatch.setattr(mini, "device", torch.device(device))
    reason = optimizations.create("flat_encoder").unavailable(mini)
    assert reason == f"on {device} the flat encoder needs CUDA and the package triton"


def test_it_says_where_it_does_not_fit(mini, monkeypatch):
    """The miniature's weights are on a CPU, where it makes no difference."""
    pytest.importorskip("triton")
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    encoder, plugin = mini.model.s3gen.flow.encoder, optimizations.create("flat_encoder")
    assert plugin.unavailable(mini) is None
    for owner, attribute, other in (
        (encoder, "static_chunk_size", 50),
        (encoder, "encoders", torch.nn.ModuleList()),
        (encoder.embed, "pos_enc", RelPositionalEncoding(128, 0.0)),
        (encoder.encoders[1], "normalize_before", False),
        (encoder.up_encoders[0], "conv_module", torch.nn.Identity()),
        (encoder.up_encoders[0].feed_forward, "w_2", NonDynamicallyQuantizableLinear(4, 4)),
        (encoder, "pre_lookahead_layer", torch.nn.Identity()),
    ):
        mini.swap(owner, attribute, other)
        assert "other layers" in plugin.unavailable(mini), attribute
        mini.reset()
        assert plugin.unavailable(mini) is None
    mini.swap(encoder.encoders[0].self_attn, "d_k", 48)
    assert "powers of two" in plugin.unavailable(mini)
