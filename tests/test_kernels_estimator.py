"""The flow's estimator in Triton: a small one in the interpreter, upstream's size on a GPU."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.decoder import ConditionalDecoder
from interpreter import interpreted, not_interpreted
from test_kernels import relative_error

import optimizations
from harness import checkpoints
from harness.pipeline import Pipeline
from optimizations.common.graphs import Graphs, Uncaptured
from optimizations.flow.static_shape import StaticSolver
from optimizations.mixed_precision import cast_estimator

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
MELS = 16


def tiny(meanflow=False):
    """An estimator of two ResNets at the ends and one between, a block behind each; float32."""
    torch.manual_seed(0)
    estimator = ConditionalDecoder(
        meanflow=meanflow,
        in_channels=4 * MELS,
        out_channels=MELS,
        channels=[64],
        attention_head_dim=32,
        n_blocks=1,
        num_mid_blocks=1,
        num_heads=2,
    ).eval()
    for name, parameter in estimator.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name or ".block.2." in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return estimator


def halved(estimator, dtype):
    """The estimator as `mixed_precision` casts it."""
    flow = SimpleNamespace(decoder=SimpleNamespace(estimator=estimator))
    model = SimpleNamespace(s3gen=SimpleNamespace(flow=flow))
    cast_estimator(Pipeline(model, torch.device("cpu"), {}, name="tiny"), dtype)
    return estimator


def kernels_of(estimator):
    """The kernels' way through it, in few large programs: the interpreter takes its time for every one."""
    module = import_module("optimizations.flow.triton_estimator")
    assert module.unsupported(estimator) is None
    tiles = dict.fromkeys(module.TILES, module.Tile(64, 64, 64)) | {"row_attention": module.Tile(32, 16)}
    tiles["norm_inner"] = module.Tile(64, 64, 32, running=1)  # one program takes them all
    return module.TritonEstimator(estimator, estimator.forward, {name: (tile,) for name, tile in tiles.items()})


def inputs(lengths, longest, n_mels=MELS, device="cpu"):
    """Arguments for rows of those lengths, with noise behind their ends; every row has a time of its own."""
    generator = torch.Generator().manual_seed(1)
    rows = len(lengths)
    x, mu, cond = (torch.randn(rows, n_mels, longest, generator=generator) for _ in range(3))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).float()[:, None]
    t, spks = torch.linspace(0.1, 0.9, rows), torch.randn(rows, n_mels, generator=generator)
    tensors = {"x": x, "mask": mask, "mu": mu, "t": t, "spks": spks, "cond": cond}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def alone(arguments, row, length):
    """One row's arguments, cut to its length."""
    one = {name: tensor[row : row + 1] for name, tensor in arguments.items()}
    return one | {name: one[name][..., :length] for name in ("x", "mask", "mu", "cond")}


@interpreted
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_are_no_further_from_float32_than_the_layers(dtype):
    arguments, estimator = inputs([35, 35], 35), tiny()
    exact = estimator.forward(**arguments)
    layers = halved(estimator, dtype).forward(**arguments)
    flat = kernels_of(estimator).forward(**arguments)
    assert flat.dtype == torch.float32
    assert 0 < relative_error(flat, exact) < relative_error(layers, exact) < 0.1


@interpreted
@torch.inference_mode()
def test_padded_rows_are_the_rows_alone():
    lengths, estimator = [35, 21, 0], tiny()
    arguments = inputs(lengths, 35)
    exact = [estimator.forward(**alone(arguments, row, length)) for row, length in enumerate(lengths[:2])]
    flat = kernels_of(halved(estimator, torch.float16)).forward(**arguments)
    for row, expected in enumerate(exact):
        assert relative_error(flat[row, :, : lengths[row]], expected[0]) < 3e-3
    assert flat.isfinite().all()


@triton.jit
def activate(function: tl.constexpr, x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, function(tl.load(x + i)))


@interpreted
@pytest.mark.parametrize("meanflow", [False, True])
def test_the_solvers_own_steps_lead_where_its_usual_ones_do(meanflow, monkeypatch):
    """Two utterances of different length, a bucket that is longer than both."""
    flat = kernels_of(halved(tiny(meanflow), torch.float16))
    flat.estimator.forward = flat.forward
    cfm = SimpleNamespace(estimator=flat.estimator, inference_cfg_rate=0.7, t_scheduler="cosine", forward=None)
    given = inputs([20, 13], 20)
    arguments = [given["mu"], given["mask"], 2, 1.0, given["spks"], given["cond"], given["x"], meanflow]

    own, _ = StaticSolver(cfm, Graphs(Uncaptured), bucket=24).forward(*arguments)
    assert flat.n_calls == 2
    monkeypatch.setattr(type(flat), "solver_steps", lambda *_: None)
    usual, _ = StaticSolver(cfm, Graphs(Uncaptured), bucket=24).forward(*arguments)
    for row, length in enumerate([20, 13]):
        assert relative_error(own[row, :, :length], usual[row, :, :length]) < 1e-3, "rounded elsewhere"


@pytest.mark.parametrize(
    "flat", [pytest.param(False, marks=not_interpreted), pytest.param(True, marks=interpreted)], ids=["layers", "own"]
)
def test_lengths_that_share_memory_leave_nothing_to_each_other(flat):
    estimator = tiny()
    if flat:
        kernels = kernels_of(halved(estimator, torch.float16))
        estimator.forward = kernels.forward
    cfm = SimpleNamespace(estimator=estimator, inference_cfg_rate=0.7, t_scheduler="cosine", forward=None)
    shared = StaticSolver(cfm, Graphs(Uncaptured), bucket=4)
    for lengths in ([12], [5], [9, 7], [12]):
        given = inputs(lengths, max(lengths))
        arguments = [given["mu"], given["mask"], 1, 1.0, given["spks"], given["cond"], given["x"], False]
        expected, _ = StaticSolver(cfm, Graphs(Uncaptured), bucket=4).forward(*arguments)
        assert torch.equal(shared.forward(*arguments)[0], expected)


@interpreted
@pytest.mark.parametrize(("name", "expected"), [("_gelu", F.gelu), ("_mish", F.mish)])
def test_activations_are_pytorchs(name, expected):
    x = torch.cat((torch.linspace(-20, 20, 4094), torch.tensor([-300.0, 300.0])))
    y = torch.empty_like(x)
    function = getattr(import_module("optimizations.flow.triton_kernels"), name)
    activate[(1,)](function, x, y, n=len(x))
    torch.testing.assert_close(y.double(), expected(x.double()), atol=2e-6, rtol=1e-6)


@interpreted
def test_a_tile_is_taken_while_its_programs_fit_on_the_processors_at_once():
    module = import_module("optimizations.flow.triton_estimator")
    small, large, any_number = module.Tile(16, at_once=1), module.Tile(32, at_once=2), module.Tile(64)
    flat = module.TritonEstimator(tiny(), masked=None)
    flat.n_processors, flat.tiles = 10, {"kernel": (small, large, any_number)}

    def taken(frames):
        return flat._tile("kernel", lambda tile: -(-frames // tile.rows))

    assert (taken(160), taken(161), taken(640), taken(641)) == (small, large, large, any_number)


@interpreted
@pytest.mark.parametrize(("kilobytes", "kept"), [(99, 1), (163, 2), (227, 3)])
def test_a_tile_is_left_out_where_its_shared_memory_is_not(kilobytes, kept, monkeypatch):
    module = import_module("optimizations.flow.triton_estimator")
    tiles = {"kernel": (module.Tile(16, kilobytes=200), module.Tile(16, kilobytes=160), module.Tile(16))}
    monkeypatch.setattr("optimizations.flow.tiles.shared_bytes", lambda _device: kilobytes << 10)
    assert module.TritonEstimator(tiny(), None, tiles).tiles == {"kernel": tiles["kernel"][-kept:]}


# -- on a GPU: upstream's size, random weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("random", "cuda")


@pytest.fixture
def large(loaded):
    yield loaded
    loaded.reset()


def estimator_of(pipeline):
    return pipeline.model.s3gen.flow.decoder.estimator


def apply(pipeline, name, **params):
    plugin = optimizations.create(name, params)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def velocity(pipeline, arguments):
    with torch.inference_mode():
        return estimator_of(pipeline).forward(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 1000), (2, 333), (24, 704)])  # the last has tiles for many frames
def test_gpu_velocities_are_no_further_from_float32_than_the_layers(large, dtype, shape, capsys):
    rows, length = shape
    arguments = inputs([length] * rows, length, 80, "cuda")
    large.swap(torch.backends.cudnn, "allow_tf32", False)
    exact = velocity(large, arguments)
    apply(large, "mixed_precision", dtype=dtype, tf32=False)
    layers = relative_error(velocity(large, arguments), exact)
    apply(large, "flat_estimator")
    flat = relative_error(velocity(large, arguments), exact)
    with capsys.disabled():
        print(f"\n{rows} x {length} frames, {dtype}: {flat:.1e} from float32, the layers {layers:.1e}")
    assert 0 < flat < layers < 0.1


@pytest.mark.gpu
def test_gpu_every_tile_is_right(large, capsys):
    """Each alone, as what may be read before it is written depends on the tile; the same bits every time."""
    arguments = inputs([1000, 1000], 1000, 80, "cuda")
    large.swap(torch.backends.cudnn, "allow_tf32", False)
    exact = velocity(large, arguments)
    apply(large, "mixed_precision", tf32=False)
    layers = relative_error(velocity(large, arguments), exact)
    estimator, module = estimator_of(large), import_module("optimizations.flow.triton_estimator")
    errors = {}
    for name, tiles in module.TILES.items():
        for tile in tiles:
            flat = module.TritonEstimator(estimator, estimator.forward, module.TILES | {name: (tile,)})
            with torch.inference_mode():
                first, *others = [flat.forward(**arguments) for _ in range(5)]
            assert all(torch.equal(first, other) for other in others), (name, tile)
            errors[name, tile] = relative_error(first, exact)
    with capsys.disabled():
        print(f"\n{len(errors)} tiles: {min(errors.values()):.1e} to {max(errors.values()):.1e}, layers {layers:.1e}")
    assert all(0 < error < layers for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 32])
def test_gpu_padded_rows_are_the_rows_alone(large, rows):
    lengths = [1000 - 97 * (row % 9) for row in range(rows)]
    arguments = inputs(lengths, 1024, 80, "cuda")
    apply(large, "mixed_precision")
    apply(large, "flat_estimator")
    together = velocity(large, arguments)
    assert together.isfinite().all()
    for row in range(0, rows, 3):
        expected = velocity(large, alone(arguments, row, lengths[row]))
        # Many frames are cut into other tiles, whose sums bfloat16 rounds otherwise: by what it rounds anyway.
        assert relative_error(together[row, :, : lengths[row]], expected[0]) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 24])
def test_gpu_captured_and_repeated_it_gives_the_same_bits(large, rows):
    """Were anything read before it is written, kernels in close succession would show it."""
    arguments = inputs([704, 650] * (rows // 2), 704, 80, "cuda")
    apply(large, "mixed_precision")
    apply(large, "flat_estimator")
    expected = velocity(large, arguments)
    assert torch.equal(velocity(large, arguments), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = velocity(large, arguments)
    with torch.inference_mode():
        for _ in range(20):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_gpu_kernels_that_wait_for_the_one_before_compute_the_same_bits(large):
    arguments = inputs([704, 650], 704, 80, "cuda")
    apply(large, "mixed_precision")
    estimator, module = estimator_of(large), import_module("optimizations.flow.triton_estimator")
    flat = module.TritonEstimator(estimator, estimator.forward)
    assert flat.overlap
    with torch.inference_mode():
        early = flat.forward(**arguments)
        flat.overlap = False
        assert torch.equal(flat.forward(**arguments), early)


@pytest.mark.gpu
def test_gpu_the_plugin_shows_its_kernels_in_captured_steps(large):
    assert "mixed_precision" in optimizations.create("flat_estimator").unavailable(large)
    apply(large, "mixed_precision")
    plugin = apply(large, "flat_estimator")
    apply(large, "cuda_graphs", tokens=50)
    voice = next(iter(large.voices))
    assert np.isfinite(large.synthesize("Good morning.", voice, 1, n_tokens=40).wave).all()
    evidence = plugin.evidence(large)
    assert evidence.active, evidence
    assert evidence.facts["masked_calls_count"] == 0
    assert evidence.facts["triton_kernels_count"]["row_attention"] >= 10 * 56
