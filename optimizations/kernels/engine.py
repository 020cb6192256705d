"""The static engine's decode step through the Triton kernels of `decode.py`: five launches a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn
from transformers import LlamaModel

from optimizations.engines import StaticEngine, attention_rows
from optimizations.kernels import decode

MAX_ROWS = 16
"""Beyond that a product is no longer bound by its weights, and matrix units are faster than these kernels."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel does: that many outputs (of each of its matrices), with that many warps."""

    outputs: int
    warps: int


TILES = {
    "rmsnorm_qkv_rope": Tile(4, 4),
    "combine_o_residual": Tile(8, 4),
    "rmsnorm_gate_up_silu": Tile(4, 4),
    "down_residual": Tile(4, 8),
    "speech_head": Tile(8, 4),
}
ATTENTION_WARPS = 4
ATTENTION_PROGRAMS = 128
"""About as many as a large GPU has multiprocessors: fewer (row, head) pairs than that are split."""
MAX_SPLITS = 8
"""Every program of the output product reads all splits."""


def unsupported(tfmr: LlamaModel) -> str | None:
    """Why the kernels cannot run this transformer where it is, in words a user can act on; None if they can."""
    config: Any = tfmr.config
    weights = [p for layer in tfmr.layers for p in layer.parameters()]
    linears = [m for layer in tfmr.layers for m in layer.modules() if "Linear" in type(m).__name__]
    if weights[0].device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton kernels need a CUDA device, and T3 is on {weights[0].device}"
    if any(type(linear) is not nn.Linear for linear in linears):
        return "the Triton kernels read plain weights, and T3's are quantized: switch quantization off for t3"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        return f"the Triton kernels want one floating dtype in all layers of T3, which has {sorted(map(str, dtypes))}"
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size & (size - 1) for size in sizes):
        return f"the Triton kernels want powers of two for width, MLP and head size, which are {sizes}"
    grouped = config.num_key_value_heads != config.num_attention_heads
    if grouped or config.num_attention_heads * config.head_dim != config.hidden_size:
        return "the Triton kernels want as many key heads as query heads, together as wide as the model"
    if any(linear.bias is not None for linear in linears):
        return "the Triton kernels add no bias, and T3's layers have one"
    return None


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def n_splits(row_heads: int) -> int:
    """Programs that share one row's head, a power of two."""
    wanted = max(1, min(MAX_SPLITS, ATTENTION_PROGRAMS // row_heads))
    return 1 << (wanted.bit_length() - 1)


class FusedEngine(StaticEngine):
    """The static engine whose steps, up to MAX_ROWS rows, are the Triton kernels; prompts go through the layers.

    The residual stream and all sums are float32, whatever the weights are, so bfloat16 loses less than it does in the
    layers. Work grows with the filled part of the cache alone: attention reads its bounds from `position`, and a
    step's `extent` does not matter to it.
    """

    def __init__(
        self, tfmr: LlamaModel, bucket: int = 256, tiles: Mapping[str, Tile] = TILES, overlap: bool | None = None
    ) -> None:
        """`overlap`: start kernels early; None where the device can."""
        super().__init__(tfmr, bucket)
        self.tiles = tiles
        self.overlap = can_overlap(tfmr.norm.weight.device) if overlap is None else overlap

    def step(self, embeds: Tensor) -> Tensor:
        if self.length == self.capacity:
            self._reserve(embeds.shape[0], self.length + 1, embeds)
        self.position.fill_(self.length)
        hidden = self.fixed_step(embeds, self.length + 1)
        self.length += 1
        return hidden

    def fixed_step(self, embeds: Tensor, extent: int) -> Tensor:
        rows = embeds.shape[0]
        if rows > MAX_ROWS:
            return super().fixed_step(embeds, extent)
        config, like = self.tfmr.config, self.keys[0]
        width, heads = config.hidden_size, config.num_attention_heads
        splits = n_splits(rows * heads)
        x = embeds[:, 0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        q = torch.empty_like(x)
        parts = x.new_empty(splits, rows, width)
        masses = x.new_empty(splits, rows, heads)
        activated = like.new_empty(rows, config.intermediate_size)
        hidden = like.new_empty(rows, width)
        self.rows = [torch.empty(0)] * len(self.heads)
        for index, layer in enumerate(self.tfmr.layers):
            self._qkv(index, layer, x, q)
            for slot, (watched, head) in enumerate(self.heads):
                if watched == index:
                    self.rows[slot] = self._watched_row(q, index, head, extent)
            self._attention(index, q, parts, masses)
            self._output(layer.self_attn.o_proj, parts, masses, x)
            self._gate_up(layer, x, activated)
            self._down(layer.mlp.down_proj, activated, x)
        self._launch(
            decode.final_rmsnorm,
            (rows,),
            (x, self.tfmr.norm.weight, hidden, self.tfmr.norm.variance_epsilon),
            {"C": width},
            warps=4,
        )
        return hidden

    # -- one launch each -----------------------------------------------------------------------------------------

    def _qkv(self, index: int, layer: Any, x: Tensor, q: Tensor) -> None:
        attention, norm = layer.self_attn, layer.input_layernorm
        (rows, width), tile = x.shape, self.tiles["rmsnorm_qkv_rope"]
        weights = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        self._launch(
            decode.rmsnorm_qkv_rope,
            (width // (2 * tile.outputs), 3),
            (x, norm.weight, *weights, self._cos, self._sin, q, self.keys[index], self.values[index])
            + (self.position, self.pads, self.capacity, norm.variance_epsilon),
            {"R": rows, "C": width, "D": attention.head_dim, "B": tile.outputs},
            tile.warps,
        )

    def _attention(self, index: int, q: Tensor, parts: Tensor, masses: Tensor) -> None:
        splits, rows, heads = masses.shape
        keys, values = self.keys[index], self.values[index]
        head_dim = keys.shape[-1]
        self._launch(
            decode.split_attention,
            (rows * heads, splits),
            (q, keys, values, self.position, self.valid_slots.view(torch.uint8), parts, masses)
            + (self.capacity, head_dim**-0.5),
            # A block of keys and one of values are held in registers: 256 bytes a slot at full size in bfloat16.
            {"R": rows, "H": heads, "D": head_dim, "S": splits, "BLOCK": 256 // keys.element_size()},
            ATTENTION_WARPS,
        )

    def _output(self, linear: nn.Linear, parts: Tensor, masses: Tensor, x: Tensor) -> None:
        splits, rows, heads = masses.shape
        width, tile = x.shape[1], self.tiles["combine_o_residual"]
        self._launch(
            decode.combine_o_residual,
            (width // tile.outputs,),
            (parts, masses, linear.weight, x),
            {"R": rows, "C": width, "D": width // heads, "S": splits, "B": tile.outputs},
            tile.warps,
        )

    def _gate_up(self, layer: Any, x: Tensor, activated: Tensor) -> None:
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        (rows, width), inner, tile = x.shape, activated.shape[1], self.tiles["rmsnorm_gate_up_silu"]
        self._launch(
            decode.rmsnorm_gate_up_silu,
            (inner // tile.outputs,),
            (x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, activated, norm.variance_epsilon),
            {"R": rows, "C": width, "M": inner, "B": tile.outputs},
            tile.warps,
        )

    def _down(self, linear: nn.Linear, activated: Tensor, x: Tensor) -> None:
        (rows, width), inner, tile = x.shape, activated.shape[1], self.tiles["down_residual"]
        self._launch(
            decode.down_residual,
            (width // tile.outputs,),
            (activated, linear.weight, x),
            {"R": rows, "C": width, "M": inner, "B": tile.outputs},
            tile.warps,
        )

    def _launch(self, kernel: Any, grid: tuple[int, ...], args: tuple, sizes: dict[str, int], warps: int) -> None:
        launch(kernel, grid, args, sizes, warps, self.overlap)

    def _watched_row(self, q: Tensor, index: int, head: int, extent: int) -> Tensor:
        """The newest attention row [R / 2, 1, extent] of a watched head; slots to come have weight 0."""
        rows, keys = q.shape[0] // 2, self.keys[index]
        query = q[:rows].unflatten(-1, (-1, keys.shape[-1]))[:, head, None]
        slots = torch.arange(extent, device=q.device)
        visible = self.valid_slots[:rows, :extent] & (slots <= self.position)
        return attention_rows(query, keys[:rows, head, :extent], visible, 1)


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple, sizes: dict[str, int], warps: int, overlap: bool
) -> None:
    """Launch a kernel; with `overlap` it may start before the one in front of it has ended."""
    kernel[grid](*args, **sizes, OVERLAP=overlap, num_warps=warps, launch_pdl=overlap)


def head_logits(linear: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's logits [R, V], float32, of hidden states [R, C]."""
    rows, width = hidden.shape
    size, tile = linear.weight.shape[0], TILES["speech_head"]
    logits = torch.empty(rows, size, device=hidden.device)
    launch(
        decode.speech_head,
        (triton.cdiv(size, tile.outputs),),
        (hidden.contiguous(), linear.weight, logits, size),
        {"R": rows, "C": width, "B": tile.outputs},
        tile.warps,
        can_overlap(hidden.device),
    )
    return logits
