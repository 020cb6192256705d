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
