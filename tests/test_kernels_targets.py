"""Every Triton kernel at full size, compiled for the GPUs that people have; no GPU is needed for that, only minutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from interpreter import not_interpreted
from test_kernels_estimator import halved
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from harness.sampling import TURBO, Sampling
from optimizations.common.memory import Reused
from optimizations.t3.blocks import by_outputs
from optimizations.t3.int8 import Int8Linear, in_8_bits
from optimizations.t3.sampling import Filters, SamplingTensors
from optimizations.t3.token_buffers import TokenBuffers

triton = pytest.importorskip("triton")
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Compute capabilities (A100, RTX 30, RTX 40, H100), and the shared memory that a program may have there."""
OVERLAPS = 90
"""From here on a kernel may start before the one in front of it has ended."""
FRAMES = 1024


class Elsewhere:
    """What Triton asks a driver for, of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that what was compiled for one is not taken for another

    def get_current_stream(self, _device: Any = None) -> int:
        return 0


@contextmanager
def compiled(capability: int, patch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Within, launches compile for that capability and run nothing; the shared memory of each kernel, in bytes."""
    launching = import_module("optimizations.common.launching")
    kind = import_module("triton.runtime.jit").JITFunction
    warmup, found = kind.warmup, {}

    def kept(kernel: Any, *args: Any, **options: Any) -> Any:
        made = warmup(kernel, *args, **options)
        found[kernel.__name__] = max(found.get(kernel.__name__, 0), made.metadata.shared)
        return made

    driver = import_module("triton.runtime.driver").driver
    outside = launching._compiling.set(True)
    patch.setattr(kind, "warmup", kept)
    patch.setattr(driver, "_active", Elsewhere(capability))
    try:
        yield found
    finally:
        launching._compiling.reset(outside)


def decode_steps(capability: int) -> None:
    """Both kinds of transformer, in bfloat16 and in 8 bits, for few rows and for many, and what follows the logits."""
    kernels = import_module("optimizations.t3.triton_engine")
    llama = LlamaModel(LlamaConfig(**LLAMA_CONFIGS["Llama_520M"] | {"num_hidden_layers": 1}))
    gpt2 = GPT2Model(GPT2Config(**LLAMA_CONFIGS["GPT2_medium"] | {"n_layer": 1}))
    for tfmr, rows in ((llama, (2, 6, 64)), (gpt2, (1, 64))):
        for parameter in tfmr.parameters():
            parameter.data = parameter.data.bfloat16()
        for weight, laid_out in by_outputs(tfmr):
            weight.data = laid_out
        for in_half, int8_cache in ((True, False), (True, True), (False, False)):
            engine = kernels.engine_for(tfmr if in_half else in_8_bits(tfmr))
            engine.int8_cache = int8_cache
            engine.overlap = capability >= OVERLAPS
            for n in rows[-1:] if int8_cache else rows:
                engine.reserve(n, FRAMES - 1)
                engine.static_step(torch.zeros(n, 1, 1024, dtype=torch.bfloat16), FRAMES)
    words = Int8Linear(torch.zeros(3072, 1024), torch.zeros(3072))
    prompts, many = import_module("optimizations.t3.triton_int8"), torch.zeros(192, 1024, dtype=torch.bfloat16)
    for tile in [tile for tile in prompts.TILES if tile.kilobytes <= SHARED_KB[capability]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompts, "TILES", (tile,))
            prompts.product(many, words)
    sampling = import_module("optimizations.t3.triton_sampling")
    for drawn, sides, n_ids in ((Sampling(), 2, 8194), (TURBO, 1, 6563)):
        table, settings = torch.zeros(n_ids, 1024), SamplingTensors(torch.device("cpu"))
        kernels.head_logits(torch.nn.Linear(1024, n_ids, bias=sides == 1), torch.zeros(sides, 1024))
        buffers, position = TokenBuffers.blank(1, sides, 100, table, n_ids), torch.zeros(1, dtype=torch.long)
        places = table if sides == 2 else None
        sampling.choose_tokens(
            *(torch.zeros(sides, n_ids), torch.ones(1, n_ids), settings, buffers, position, table, places, 0),
            Filters.of(drawn),
        )


def flow(capability: int) -> None:
    """The estimator, and each of its kernels in every tile that this GPU has the shared memory for."""
    kernels = import_module("optimizations.flow.triton_estimator")
    flat = full_size_estimator()
    flat.overlap = capability >= OVERLAPS
    launches = import_module("optimizations.bench.flow").Bench(flat, 2, FRAMES)
    buffers = launches.buffers
    inputs = torch.zeros(2 * FRAMES, flat.stacks[0].resnet.beside.weight.shape[1], dtype=torch.bfloat16)
    flat.stack(0, inputs, launches.times, buffers, leaving=buffers.joined[:, buffers.x.shape[1] :])
    flat.convolve(flat.down[0], buffers.entering, buffers.hidden, buffers)
    for sides in (1, 2):
        flat.solver_steps(1, sides, FRAMES, Reused(torch.device("cpu"))).step(0.7)
    for name, tiles in kernels.TILES.items():
        for tile in tiles:
            if tile.kilobytes <= SHARED_KB[capability]:
                flat.tiles = {name: (tile,)}
                launches.launch(name, 0)


def full_size_estimator() -> Any:
    estimator = halved(S3Gen().flow.decoder.estimator, torch.bfloat16)
    return import_module("optimizations.flow.triton_estimator").TritonEstimator(estimator, estimator.forward)


def encoder(capability: int) -> None:
    """The encoder in full precision, and each of its kernels in every tile that this GPU has the shared memory for."""
    kernels, bench = (import_module(f"optimizations.{name}") for name in ("flow.triton_encoder", "bench.encoder"))
    whole = S3Gen().flow.encoder
    exact, flat = (kernels.TritonEncoder(whole, precision) for precision in (kernels.FULL, kernels.HALF))
    exact.overlap = flat.overlap = capability >= OVERLAPS
    exact.encode(torch.zeros(1, 8, 512), torch.tensor([8]))
    launches = bench.Bench(flat, 1, FRAMES)
    for name, tiles in kernels.TILES.items():
        for tile in tiles:
            if tile.kilobytes <= SHARED_KB[capability]:
                flat.tiles = {name: (tile,)}
                launches.launch(name, 0)


def vocoder(capability: int) -> None:
    """HiFT, in the precision that production takes."""
    kernels = import_module("optimizations.vocoder.triton_hift")
    decoder = kernels.ChannelsLastHiFT(S3Gen().mel2wav, kernels.HALF)
    decoder.overlap = capability >= OVERLAPS
    decoder.decode(torch.zeros(1, 80, 8), torch.zeros(1, 1, 8 * 480), torch.tensor([8]))


@not_interpreted
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", SHARED_KB)
@pytest.mark.parametrize("stage", [decode_steps, flow, encoder, vocoder])
@torch.inference_mode()
def test_kernels_compile_for(stage: Callable[[int], None], capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled(capability, monkeypatch) as shared:
        stage(capability)
    assert len(shared) >= 2
    too_large = {name: size for name, size in shared.items() if size > SHARED_KB[capability] * 1024}
    assert not too_large
