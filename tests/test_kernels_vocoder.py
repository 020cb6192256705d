"""HiFT through the Triton kernels: in Triton's interpreter on a CPU, and as it is on a GPU."""

from importlib import import_module

import pytest
import torch
from chatterbox.models.s3gen.hifigan import HiFTGenerator, ResBlock, Snake
from interpreter import INTERPRETED, interpreted

from harness import checkpoints
from optimizations.vocoder import static_shape


@pytest.fixture(autouse=True)
def _loops_to_a_picked_number(monkeypatch):
    """What Triton's interpreter cannot do with the NumPy of today: take a loop to a number that is a tensor."""
    if not INTERPRETED:
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)


def triton_hift():
    return import_module("optimizations.vocoder.triton_hift")


def relative_error(a, b):
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def tiny(rates, dilations, channels=32):
    """A HiFT with all that the large one has, but for its size."""
    torch.manual_seed(0)
    hift = HiFTGenerator(
        base_channels=channels,
        sampling_rate=24000,
        upsample_rates=rates,
        upsample_kernel_sizes=[rate + 4 for rate in rates],
        resblock_dilation_sizes=[dilations] * 3,
        source_resblock_kernel_sizes=[7, 3][: len(rates)],
        source_resblock_dilation_sizes=[dilations] * len(rates),
    )
    return with_lively_snakes(hift.requires_grad_(False).eval())


def with_lively_snakes(hift):
    """Upstream's begin with a parameter of 1 in all channels; trained ones have one each."""
    for module in hift.modules():
        if isinstance(module, Snake):
            torch.nn.init.uniform_(module.alpha, 0.2, 2)
    return hift


def inputs(hift, rows, n_frames, end, device="cpu"):
    """Mels and sources, of which `end` frames count, with noise behind the sources' end."""
    samples = int(hift.f0_upsamp.scale_factor)
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(rows, 80, n_frames, generator=generator)
    mel[:, :, end:] = 0
    excitation = 0.3 * torch.randn(rows, 1, samples * n_frames, generator=generator)
    return mel.to(device), excitation.to(device), torch.tensor([end], device=device)


def few_programs():
    """Large tiles for all: the interpreter takes its time for every program."""
    kernels = triton_hift()
    kinds = [kernels.Kind(channels, n) for channels in (32, 16, 512) for n in (1, 3)]
    return dict.fromkeys(kinds, kernels.Tile(128, 32, 32, 4, 1))


def decoded(hift, precision, mel, excitation, frames):
    with torch.inference_mode():
        return triton_hift().ChannelsLastHiFT(hift, precision, few_programs()).decode(mel, excitation, frames)


# -- in the interpreter --------------------------------------------------------------------------------------------


@interpreted
def test_blocks_of_all_kernels_and_dilations():
    """Kernels 3, 7 and 11 side by side, in three pairs, against upstream's own decode of the row by itself."""
    hift = tiny([2], [1, 3, 5])
    assert [block.convs1[0].kernel_size[0] for block in hift.resblocks] == [3, 7, 11]
    mel, excitation, frames = inputs(hift, rows=1, n_frames=6, end=4)
    alone = hift.decode(mel[..., :4], excitation[..., : 4 * 8])
    wave = decoded(hift, triton_hift().FULL, mel, excitation, frames)
    assert relative_error(wave[:, : alone.shape[1]], alone) < 1e-5


@interpreted
@pytest.mark.slow
def test_levels_and_rows():
    hift = tiny([3, 2], [3], channels=64)
    mel, excitation, frames = inputs(hift, rows=2, n_frames=3, end=2)
    expected = static_shape.decode(hift, mel, excitation, frames)
    wave = decoded(hift, triton_hift().FULL, mel, excitation, frames)
    assert relative_error(wave, expected) < 1e-5


@interpreted
@pytest.mark.parametrize("name", ["TF32", "HALF"])
def test_rounded_operands(name):
    """A pair of snake and convolution as good as 10 bits of mantissa are; its length and its zeros behind the end."""
    kernels = triton_hift()
    torch.manual_seed(2)
    block = with_lively_snakes(ResBlock(16, 3, [5])).requires_grad_(False)
    hift = tiny([2], [3])
    precision = getattr(kernels, name)
    flat = kernels.ChannelsLastHiFT(hift, precision, few_programs())
    x, end = torch.randn(1, 16, 40), kernels.End(torch.tensor([3]), 10, 1)
    activated = kernels.operands(block.activations1[0](x[..., :31]).transpose(1, 2), precision)
    activated = torch.nn.functional.pad(activated, (0, 0, 0, 9)).contiguous()[None]
    pair = kernels.pairs([block], precision)[0]
    _, active = flat.run(pair.first, activated, 40, end, alpha=pair.second_alpha)
    residual = x.transpose(1, 2).contiguous()[None]
    total, _ = flat.run(pair.second, active, 40, end, total=True, residual=residual)
    assert active.dtype == precision.dtype
    assert 1e-7 < relative_error(total[0, :, :31].transpose(1, 2), block(x[..., :31])) < 5e-4
    assert not active[0, :, 31:].any()
    assert not total[0, :, 31:].any()


@interpreted
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda hift: setattr(hift, "num_kernels", 1), "residual blocks"),
        (lambda hift: setattr(hift.resblocks[0].convs1[0], "dilation", (2,)), "dilations"),
        (lambda hift: setattr(hift.resblocks[0].activations1[0], "alpha_logscale", True), "logarithmic"),
        (lambda hift: hift.istft_params.update(n_fft=20), "transform"),
    ],
)
def test_what_the_kernels_cannot_run_is_named(change, says):
    hift = tiny([2], [1])
    assert triton_hift().unsupported(hift) is None
    change(hift)
    assert says in triton_hift().unsupported(hift)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("random", "cuda")


@pytest.fixture
def large(loaded):
    """The full-size HiFT without TF32, as it was again after the test."""
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn):
        loaded.swap(switch, "allow_tf32", False)
    hift = loaded.model.s3gen.mel2wav
    loaded.swap(hift, "stft_window", hift.stft_window.cuda())
    yield hift
    loaded.reset()


@torch.inference_mode()
def captured(work):
    """What a CUDA graph of `work` gives, replayed twice."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    once = result.clone()
    graph.replay()
    assert torch.equal(result, once)
    return once


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n_frames", "end"), [(1, 512, 500), (1, 64, 1), (3, 128, 77)])
@torch.inference_mode()
def test_gpu_wave_is_the_operators_in_float32(large, rows, n_frames, end):
    batch = inputs(large, rows, n_frames, end, "cuda")
    expected = static_shape.decode(large, *batch)
    flat = triton_hift().ChannelsLastHiFT(large, triton_hift().FULL)
    wave = flat.decode(*batch)
    assert relative_error(wave, expected) < 1e-4
    assert torch.equal(captured(lambda: flat.decode(*batch)), wave)


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_padding_changes_no_bit(large):
    mel, excitation, frames = inputs(large, 1, 256, 200, "cuda")
    flat = triton_hift().ChannelsLastHiFT(large, triton_hift().HALF)
    wave = flat.decode(mel, excitation, frames)[:, : 200 * 480]
    alone = flat.decode(mel[..., :200].contiguous(), excitation[..., : 200 * 480].contiguous(), frames)
    assert torch.equal(wave, alone)


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_rounded_products_are_no_further_off_than_cudnns(large, capsys):
    batch = inputs(large, 1, 512, 500, "cuda")
    exact = static_shape.decode(large, *batch)
    torch.backends.cudnn.allow_tf32 = True  # the fixture puts it back
    errors = {"cuDNN's TF32": relative_error(static_shape.decode(large, *batch), exact)}
    for name in ("TF32", "HALF"):
        flat = triton_hift().ChannelsLastHiFT(large, getattr(triton_hift(), name))
        wave = flat.decode(*batch)
        errors[name] = relative_error(wave, exact)
        assert torch.equal(captured(lambda flat=flat: flat.decode(*batch)), wave)
    with capsys.disabled():
        print(f"\nrelative errors against float32: {errors}")
    assert max(errors["TF32"], errors["HALF"]) < 1.5 * errors["cuDNN's TF32"]
