"""The flow's encoder in Triton: a small one in the interpreter, upstream's size on a GPU."""

from importlib import import_module

import pytest
import torch
from chatterbox.models.s3gen.transformer.upsample_encoder import (
    PreLookaheadLayer,
    Upsample1D,
    UpsampleConformerEncoder,
)
from interpreter import interpreted
from test_kernels import relative_error

from optimizations.common.padding import within
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


# -- on a GPU: upstream's size, random weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    return UpsampleConformerEncoder().eval().to("cuda")


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
