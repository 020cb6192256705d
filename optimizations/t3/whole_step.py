"""A whole decode step in one launch: `whole_step.cu`, compiled by NVRTC, which comes with PyTorch."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizations.common.launching import n_processors, only_compiling, shared_bytes
from optimizations.t3.blocks import Blocks
from optimizations.t3.int8 import Int8Linear
from optimizations.t3.triton_batched import Layer

SOURCE = Path(__file__).with_name("whole_step.cu")
WIDTH, HEAD, OWN = 1024, 64, 8
"""What the kernel is written for: the model's width, a head's, and the outputs of the stream that a processor keeps."""
MAX_ROWS = 2
WARPS = 9
STAGE_BYTES = 8 * (WIDTH + 64)
DIGIT_BYTES = 8 * 3 * 128
"""Of shared memory, for each row and a thousand inputs of the widest product."""
FIXED_BYTES = 10 * 1024
"""Of shared memory beside the ring's stages and the digits, rounded up."""
MAIL_WORDS = 6 * MAX_ROWS * WIDTH + 8 * WIDTH // HEAD * (HEAD + 4)
"""What the kernel's `Mail` has beside the inner activations."""
MAX_SLOTS = 8192
"""Of which a lane keeps in 64 bits which ones its row may look at."""


def unsupported(blocks: Blocks, device: torch.device, scaled: bool) -> str | None:
    """Why the kernel cannot take a step of these blocks there, in words for a record; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "it needs a GPU of compute capability 9.0 or more"
    if not scaled or blocks.dtype != torch.bfloat16:
        return "it reads weights of int8_weights, and a cache in bfloat16"
    width = blocks.heads * blocks.head_dim
    if (width, blocks.head_dim) != (WIDTH, HEAD) or blocks.inner % WIDTH or blocks.inner > 4 * WIDTH:
        return f"it is written for a width of {WIDTH} in heads of {HEAD}, and one to four times that in the MLP"
    if n_processors(device) < WIDTH // OWN or shared_bytes(device) < 24 * STAGE_BYTES:
        return f"it needs {WIDTH // OWN} processors, and their shared memory"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "it is compiled by cuda.bindings, which comes with PyTorch 2.10 and later"
    return None


class WholeStep:
    """The kernel for one engine's weights; what it works on beside them is the caller's."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        self.blocks, self.device, self.gpt2 = blocks, device, not blocks.rotates
        self.layers = [Layer.of(layer) for layer in blocks.layers]
        with torch.no_grad():  # or what they are made of would be kept with them
            self.numbers = torch.stack([_numbers(layer, self.gpt2) for layer in self.layers])
        self.mail = torch.zeros(MAIL_WORDS + blocks.inner, dtype=torch.int64, device=device)
        self.tags = torch.zeros(1, dtype=torch.int32, device=device)
        self._addressed: Tensor | None = None
        self._of: tuple[int, ...] = ()

    def follow(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Know where the cache lies; not while a step is captured."""
        where = tuple(slots.data_ptr() for slots in (*keys, *values))
        if where != self._of:
            rows = zip(self.layers, keys, values, strict=True)
            self._addressed = torch.tensor([self._addresses(*row) for row in rows], device=self.device)
            self._of = where

    def _addresses(self, layer: Layer, keys: Tensor, values: Tensor) -> list[int]:
        """As the kernel's `Layer` has them."""
        weights = [product.weight.data_ptr() for product in _products(layer)]
        if self.gpt2:
            qkv, out, up, down = weights
            size = WIDTH * WIDTH
            weights = [qkv, qkv + size, qkv + 2 * size, out, 0, up, down]
        return [*weights, keys.data_ptr(), values.data_ptr()]

    def __call__(
        self,
        embeds: Tensor,
        tables: tuple[Tensor, ...],
        position: Tensor,
        pads: Tensor,
        valid: Tensor,
        ended: Tensor | None,
        x: Tensor,
    ) -> None:
        """The step at the slot `position` [1]: from R rows' embeddings [R, C] to the stream behind the last layer, `x`
        [R, C], both float32.

        `tables`: what the blocks know of positions, bfloat16; `pads` [R], `valid` [R, capacity], `ended` as the engine
        has them.
        """
        assert self._addressed is not None, "`follow` tells where the cache lies"
        blocks, rows = self.blocks, len(embeds)
        kernel, n_bytes = _kernel(self.device, len(blocks.layers), blocks.inner, blocks.heads, rows, self.gpt2)
        if only_compiling():
            return
        learned, cos, sin = (tables[0], x, x) if self.gpt2 else (x, *tables)
        model = (self._addressed, self.numbers, self.mail, self.tags)
        pointers = (*model, embeds, learned, cos, sin, position, pads, valid, x)
        values = (*(tensor.data_ptr() for tensor in pointers), valid.shape[1], blocks.epsilon)
        values += (0, 0) if ended is None else (ended.data_ptr(), ended.numel())
        kinds = (*[ctypes.c_void_p] * len(pointers), ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int)
        driver = import_module("cuda.bindings.driver")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = WIDTH // OWN, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * WARPS, 1, 1
        config.sharedMemBytes = n_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        # All processors or none: those that came would wait for the others.
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        config.attrs, config.numAttrs = [together], 1
        _checked(driver.cuLaunchKernelEx(config, kernel, (values, kinds), 0))


def _products(layer: Layer) -> list[Any]:
    """In the order of their use."""
    return [*layer.qkv, layer.out, *layer.inner, layer.outer]


def _numbers(layer: Layer, gpt2: bool) -> Tensor:
    """A layer's vectors one behind the other, as the kernel's `Numbers` has them, float32."""
    numbers = [norm.weight.float() for norm in (layer.norm, layer.inner_norm)]
    numbers += [product.scale for product in _products(layer)]
    if gpt2:
        numbers += [*_folded(layer.qkv[0], layer.norm), *_folded(layer.inner[0], layer.inner_norm)]
        numbers += [layer.out.bias, layer.outer.bias]
    return torch.cat(numbers)


def _folded(product: Int8Linear, norm: Any) -> tuple[Tensor, Tensor]:
    """The weights times the gain of the LayerNorm in front of them; and times its shift, and bias."""
    weights = product.unpacked()
    assert product.bias is not None
    return weights @ norm.weight.float(), weights @ norm.bias.float() + product.bias


def sizes_of(layers: int, inner: int, heads: int, rows: int, gpt2: bool, shared: int) -> dict[str, int]:
    """What the kernel is compiled with for a GPU that gives a program `shared` bytes of shared memory."""
    fixed = FIXED_BYTES + rows * inner // WIDTH * DIGIT_BYTES
    stages = (shared - fixed) // STAGE_BYTES
    return {
        "LAYERS": layers,
        "WIDTH": WIDTH,
        "INNER": inner,
        "HEADS": heads,
        "ROWS": rows,
        "GPT2": int(gpt2),
        "STAGES": stages,
        "SHARED_BYTES": fixed + stages * STAGE_BYTES,
        "MAIL_BYTES": 8 * (MAIL_WORDS + inner),
        "NUMBERS": (15 * WIDTH + 3 * inner) if gpt2 else (7 * WIDTH + 2 * inner),
    }


@cache
def _kernel(device: torch.device, layers: int, inner: int, heads: int, rows: int, gpt2: bool) -> tuple[Any, int]:
    """The kernel for these sizes, loaded, and the shared memory that it takes."""
    sizes = sizes_of(layers, inner, heads, rows, gpt2, shared_bytes(device))
    driver, n_bytes = import_module("cuda.bindings.driver"), sizes["SHARED_BYTES"]
    module = _checked(driver.cuModuleLoadData(compiled(sizes, torch.cuda.get_device_capability(device))))
    kernel = _checked(driver.cuModuleGetFunction(module, b"whole_step"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, limit, n_bytes))
    return kernel, n_bytes


def compiled(sizes: dict[str, int], capability: tuple[int, int]) -> bytes:
    """The kernel's machine code for GPUs of that compute capability; takes no GPU.

    Raises:
        RuntimeError: what the compiler says.
    """
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    options = [f"-D{name}={size}" for name, size in sizes.items()]
    options += [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{SOURCE.name} does not compile: {log.decode().strip()}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call gave beside its result, which has to be success."""
    result, *given = answer
    if int(result):
        raise RuntimeError(f"CUDA says {result.name}")
    return given[0] if given else None
