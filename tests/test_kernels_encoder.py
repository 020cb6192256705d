"""The flow's encoder in Triton: a small one in the interpreter, upstream's size on a GPU."""

from importlib import import_module

import numpy as np
import pytest
import torch
from applied import apply_one, apply_uncaptured
from chatterbox.models.s3gen.transformer.upsample_encoder import (
    PreLookaheadLayer,
    Upsample1D,
    UpsampleConformerEncoder,
)
from interpreter import interpreted
from test_kernels import relative_error

import optimizations
from harness import checkpoints
from optimizations.common.padding import within
from optimizations.flow.batched import encode_few
from optimizations.flow.static_shape import encode

triton = pytest.importorskip("triton")
WIDTH = 64


def tiny(width=WIDTH, heads=2):
    """An encoder of two layers before the upsampling and one behind, every weight random; float32."""
    torch.manual_seed(0)
    encoder = UpsampleConformerEncoder(
        input_size=width, output_size=width, attention_heads=heads, linear_units=2 * width, num_blocks=2
    )
    encoder.pre_lookahead_layer = PreLookaheadLayer(channels=width, pre_lookahead_len=3)
    encoder.up_layer = Upsample1D(channels=width, out_channels=width, stride=2)
    encoder.up_encoders = encoder.up_encoders[:1]
    for name, parameter in encoder.named_parameters():
        if "pos_bias" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name or ".out.1." in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder.eval()


def kernels_of(encoder, name="FULL"):
    """The kernels' way through it, in few large programs: the interpreter takes its time for every one."""
    module = import_module("optimizations.flow.triton_encoder")
    assert module.unsupported(encoder) is None
    tiles = dict.fromkeys(module.TILES, (module.Tile(64, 64, 64),)) | {"relative_attention": (module.Tile(16, 32),)}
    return module.TritonEncoder(encoder, getattr(module, name), tiles)


def rows_of(lengths, longest, width=WIDTH, device="cpu"):
    """Embedded tokens of rows of those lengths, zero behind their ends, and the lengths."""
    embedded = torch.randn(len(lengths), longest, width, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(lengths)
    embedded *= within(lengths, longest)[..., None]
    return embedded.to(device), lengths.to(device)


@interpreted
@torch.inference_mode()
@pytest.mark.parametrize(("name", "most"), [("FULL", 3e-6), ("HALF", 3e-3)])
@pytest.mark.parametrize("length", [1, 21, pytest.param(64, marks=pytest.mark.slow)])
def test_hidden_frames_are_upstreams(name, most, length):
    encoder = tiny()
    embedded, lengths = rows_of([length], length)
    expected, expected_mask = encoder.forward(embedded, lengths)
    hidden, mask = kernels_of(encoder, name).forward(embedded, lengths)
    assert hidden.dtype == torch.float32
    assert relative_error(hidden, expected) < most
    assert torch.equal(mask, expected_mask)


@interpreted
@torch.inference_mode()
def test_padded_rows_are_the_rows_alone():
    lengths, encoder = [35, 20, 0], tiny()
    embedded, n = rows_of(lengths, 38)
    hidden = kernels_of(encoder).encode(embedded, n)
    assert hidden.isfinite().all()
    assert relative_error(hidden[:2, :40], encode(encoder, embedded, n)[:2, :40]) < 3e-6
    for row, length in enumerate(lengths[:2]):
        alone, _ = encoder.forward(embedded[row : row + 1, :length], n[row : row + 1])
        assert relative_error(hidden[row, : 2 * length], alone[0]) < 3e-6


@interpreted
@torch.inference_mode()
def test_what_float16_has_no_room_for_becomes_no_infinity():
    """In the stream that convolutions read, and in what one of them leaves for another."""
    encoder = tiny()
    encoder.embed.out[1].weight.mul_(1e5)
    embedded, n = rows_of([9], 9)
    assert (20 * encoder.embed.out[1](encoder.embed.out[0](embedded))).abs().max() > torch.finfo(torch.float16).max
    assert kernels_of(encoder, "HALF").encode(embedded, n).isfinite().all()


@interpreted
@pytest.mark.slow
def test_the_plugin_gives_upstreams_mel(monkeypatch):
    """On the miniature, whose steps are "captured": through `encode`, with padding behind the row."""
    module = import_module("optimizations.flow.triton_encoder")
    tiles = dict.fromkeys(module.TILES, (module.Tile(64, 64, 64),)) | {"relative_attention": (module.Tile(32, 32),)}
    monkeypatch.setattr(module, "FULL_TILES", tiles)
    monkeypatch.setattr("optimizations.flat_encoder.for_device", lambda *_: module)
    mini = checkpoints.load("mini", "cpu")
    voice = mini.stages["condition"](next(iter(mini.voices)))

    def mel():
        torch.manual_seed(0)
        with torch.inference_mode():
            return mini.stages["tokens_to_mel"]([torch.arange(12) * 40], [voice])[0]

    expected = mel()
    plugin, _ = apply_uncaptured(mini, flat_encoder={}, cuda_graphs={})
    assert relative_error(mel(), expected) < 1e-4
    assert plugin.evidence(mini).facts["operands_dtype"] == "float32"


# -- on a GPU: upstream's size, random weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    return UpsampleConformerEncoder().eval().to("cuda")


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("random", "cuda")


@pytest.fixture
def random_weights(loaded):
    yield loaded
    loaded.reset()


def flat(encoder, name):
    module = import_module("optimizations.flow.triton_encoder")
    return module.TritonEncoder(encoder, getattr(module, name))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize(("name", "most"), [("FULL", 1e-5), ("HALF", 2e-3)])
@pytest.mark.parametrize("lengths", [[500], [263, 250, 97], [500 - 31 * row for row in range(8)]])
def test_gpu_captured_and_repeated_it_is_upstreams_in_float32(large, lengths, name, most, capsys):
    assert not torch.backends.cuda.matmul.allow_tf32
    embedded, n = rows_of(lengths, max(lengths), 512, "cuda")
    kernels = flat(large, name)
    expected = kernels.encode(embedded, n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.encode(embedded, n)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
    kernels.overlap = False
    assert torch.equal(kernels.encode(embedded, n), expected)
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = encode(large, embedded, n)
    counts = within(2 * n, expected.shape[1])[..., None]
    error = relative_error(expected * counts, exact * counts)
    with capsys.disabled():
        print(f"\n{len(lengths)} rows of up to {max(lengths)}, {name}: {error:.1e}")
    assert error < most


@pytest.mark.gpu
@pytest.mark.parametrize("others", [(), ("mixed_precision",), ("mixed_precision", "cuda_graphs")], ids="+".join)
def test_gpu_the_plugin_shows_its_kernels_however_the_encoder_is_called(random_weights, others):
    plugin = optimizations.create("flat_encoder")
    for name in (name for name in optimizations.names() if name in ("flat_encoder", *others)):
        if name == "flat_encoder":
            assert plugin.unavailable(random_weights) is None
            plugin.apply(random_weights)
        else:
            apply_one(random_weights, name, **({"tokens": 50} if name == "cuda_graphs" else {}))
    voice = next(iter(random_weights.voices))
    assert np.isfinite(random_weights.synthesize("Good morning.", voice, 1, n_tokens=40).wave).all()
    evidence = plugin.evidence(random_weights)
    assert evidence.active, evidence
    assert evidence.facts["triton_kernels_count"]["relative_attention"] == 10
    assert evidence.facts["operands_dtype"] == ("float16" if others else "float32")


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_rows_of_a_batch_are_encoded_as_upstream_encodes_them(random_weights):
    """Full precision; more rows than the encoder takes at once."""
    encoder = random_weights.model.s3gen.flow.encoder
    lengths = [60 - 5 * row for row in range(10)]
    embedded, n = rows_of(lengths, 60, 512, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = encode_few(encoder, embedded, n)
    apply_one(random_weights, "flat_encoder")
    counts = within(2 * n, 120)[..., None]
    assert relative_error(encode_few(encoder, embedded, n) * counts, exact * counts) < 1e-5
