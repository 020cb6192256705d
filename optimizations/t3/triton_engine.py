"""The static engine's decode step through the Triton kernels of `triton_decode.py`, five launches a layer.

Where `whole_step.py` can take it, it is one launch instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor, nn
from transformers import GPT2Model
from transformers.pytorch_utils import Conv1D

from optimizations.common.launching import can_overlap, launch
from optimizations.t3 import triton_batched, triton_decode, triton_gpt2, triton_prompt, whole_step
from optimizations.t3.blocks import blocks_of, matrix_of, products_of
from optimizations.t3.engines import MANY_ROWS, StaticEngine, as_numbers
from optimizations.t3.int8 import Int8Linear, rounded

MAX_ROWS = MANY_ROWS
"""Beyond that a product is no longer bound by its weights, and matrix units are faster: see `triton_batched.py`."""
PARTS_TOGETHER = 32
"""Of a head's attention, how many the last program sums at once: with the tiles below, all of a thousand slots."""
SCALE_BYTES = 4
"""Of a slot's head in a cache of 8 bits."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel does: that many outputs (pairs of outputs for q, k and v; slots for attention)."""

    outputs: int
    warps: int


Tiles = Mapping[str, Tile]
TILES: dict[str, Tile] = {
    "rmsnorm_qkv_rope": Tile(1, 1),
    "attention": Tile(64, 2),
    "o_residual": Tile(4, 2),
    "rmsnorm_gate_up_silu": Tile(4, 2),
    "down_residual": Tile(2, 8),
    "speech_head": Tile(4, 4),
}
TILES_OF_8_BITS: dict[str, Tile] = TILES | {
    "rmsnorm_qkv_rope": Tile(2, 2),
    "attention": Tile(32, 1),
    "o_residual": Tile(8, 4),
    "speech_head": Tile(8, 2),
}
"""Of a Llama, for two rows."""
GPT2_TILES: dict[str, Tile] = {
    "layernorm_qkv": Tile(8, 4),
    "attention": Tile(32, 1),
    "o_residual": Tile(2, 1),
    "layernorm_gelu": Tile(8, 2),
    "down_residual": Tile(2, 4),
    "speech_head": Tile(4, 4),
}
GPT2_TILES_OF_8_BITS: dict[str, Tile] = GPT2_TILES | {
    "layernorm_qkv": Tile(4, 2),
    "o_residual": Tile(4, 2),
    "layernorm_gelu": Tile(4, 2),
    "down_residual": Tile(4, 8),
    "speech_head": Tile(8, 4),
}
"""Of a GPT-2, for one row; all of them were the fastest on an H200."""


def unsupported(tfmr: nn.Module) -> str | None:
    """Why the kernels cannot run this transformer where it is, in words a user can act on; None if they can."""
    config: Any = tfmr.config
    blocks = blocks_of(tfmr)
    weights = [p for layer in blocks.layers for p in layer.parameters()]
    linears: list[Any] = list(products_of(tfmr))
    if weights[0].device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton kernels need a CUDA device, and T3 is on {weights[0].device}"
    if any(type(linear) not in (nn.Linear, Conv1D, Int8Linear) for linear in linears):
        return (
            "the Triton kernels read plain weights or those of int8_weights, and T3's are bitsandbytes': switch "
            "quantization off for t3"
        )
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        return f"the Triton kernels want one floating dtype in all layers of T3, which has {sorted(map(str, dtypes))}"
    sizes = (config.hidden_size, blocks.inner, blocks.head_dim)
    if any(size & (size - 1) for size in sizes):
        return f"the Triton kernels want powers of two for width, MLP and head size, which are {sizes}"
    if isinstance(tfmr, GPT2Model):
        return None
    grouped = config.num_key_value_heads != config.num_attention_heads
    if grouped or config.num_attention_heads * config.head_dim != config.hidden_size:
        return "the Triton kernels want as many key heads as query heads, together as wide as the model"
    if any(linear.bias is not None for linear in linears):
        return "the Triton kernels add no bias to a Llama's products, and T3's layers have one"
    return None


def few(rows: int) -> bool:
    """Whether the kernels take that many rows."""
    return rows <= MAX_ROWS


@dataclass
class Buffers:
    """What the kernels of one step hand on: R rows, C wide, M wide in the MLP."""

    embeds: Tensor  # [R, C]: what the first layer reads
    x: Tensor  # [R, C] float32: the residual stream behind it
    q: Tensor  # [R, C] float32: rotated queries
    peaks: Tensor  # [R, H, S] float32: what attention's S programs for a head leave for the last of them
    totals: Tensor  # [R, H, S]
    sums: Tensor  # [R, H, S, D]
    attended: Tensor  # [R, C] float32: what attention gives
    activated: Tensor  # [R, M]: the MLP's inner activations


class TritonEngine(StaticEngine):
    """The static engine, its steps in Triton kernels: `triton_decode.py` up to MAX_ROWS rows, then `triton_batched.py`.

    Prompts in half precision take those of `triton_prompt.py`. Many rows against weights in 8 bits go through the
    layers; one or two rows against these go through all layers in one launch (`whole_step.py`), where the GPU and the
    sizes allow.

    The residual stream and all sums are float32, whatever the weights are, so bfloat16 loses less than it does in the
    layers. Work grows with the filled part of the cache alone: attention reads its bounds from `position`; a step's
    `extent` says how many programs stand ready.
    """

    own_tiles = TILES, TILES_OF_8_BITS

    def __init__(
        self,
        tfmr: nn.Module,
        bucket: int = 256,
        tiles: Tiles | None = None,
        overlap: bool | None = None,
    ) -> None:
        """`tiles`: None for those that were fastest. `overlap`: start kernels before the ones in front of them have
        ended; None: where the device can."""
        super().__init__(tfmr, bucket)
        self.int8_cache = False
        """Keep the keys and values of many rows in 8 bits; for plain weights."""
        self.scaled = any(isinstance(module, Int8Linear) for module in tfmr.modules())
        self.tiles = tiles or self.own_tiles[self.scaled]
        self.device = self.blocks.norm.weight.device
        self.overlap = can_overlap(self.device) if overlap is None else overlap
        self._arrived: Tensor | None = None  # of attention's programs for each row's head; 0 between launches
        self.several = _several_launches(self, tiles)
        self.whole: whole_step.WholeStep | None = None
        if not self.several:
            self.whole = whole_step.WholeStep(self.blocks, self.device)

    def _reserve(self, rows: int, length: int, like: Tensor) -> None:
        # Prompts and many rows want weights joined: before anything is captured that knows where they were.
        wanted = rows > MAX_ROWS or self._prompts_in_few_launches
        if wanted and not self.scaled and triton_batched.join(self.blocks):
            self.moves += 1
        super()._reserve(rows, length, like)
        memory, packed = self._memory, self.packs(rows)
        self.key_scales = [self._scales(of, rows) for of in memory.keys] if packed else []
        self.value_scales = [self._scales(of, rows) for of in memory.values] if packed else []
        if self.whole is not None:
            self.whole.follow(self.keys, self.values)

    @property
    def _prompts_in_few_launches(self) -> bool:
        """Not where heads are watched, whose rows the layers tell; nor in float32, where who asks for it wants the
        layers' own products, which TF32 rounds otherwise when they are joined."""
        return not self.heads and self.dtype != torch.float32

    def _run_here(self, embeds: Tensor, newest: int) -> Tensor:
        if not self._prompts_in_few_launches:
            return super()._run_here(embeds, newest)
        end = self.length + embeds.shape[1]
        mask, causal = self._mask(self.length, end)
        if mask is not None:
            mask = as_numbers(mask, self.dtype)
        hidden = triton_prompt.read(self, embeds.to(self.dtype), mask, causal)
        self.length = end
        return hidden

    # -- a cache in 8 bits -----------------------------------------------------------------------------------------

    def packs(self, rows: int) -> bool:
        """Whether the cache of so many rows is in 8 bits: numbers, and behind those of all rows their scales."""
        return self.int8_cache and not few(rows)

    def slot_bytes(self, rows: int) -> int:
        blocks = self.blocks
        return blocks.heads * (blocks.head_dim + SCALE_BYTES) if self.packs(rows) else super().slot_bytes(rows)

    def _view(self, memory: Tensor, rows: int) -> Tensor:
        if not self.packs(rows):
            return super()._view(memory, rows)
        shape = rows, self.blocks.heads, self._capacity(rows), self.blocks.head_dim
        return memory[: prod(shape)].view(torch.int8).view(shape)

    def _scales(self, memory: Tensor, rows: int) -> Tensor:
        """Of a layer's keys or values [R, heads, capacity], in its bytes."""
        shape = rows, self.blocks.heads, self._capacity(rows)
        numbers = prod(shape) * self.blocks.head_dim
        return memory[numbers : numbers + SCALE_BYTES * prod(shape)].view(torch.float32).view(shape)

    def _grow(self, rows: int, length: int, like: Tensor) -> None:
        kept = [scales[:, :, : self.length].clone() for scales in (*self.key_scales, *self.value_scales)]
        super()._grow(rows, length, like)
        if self.length and kept:
            for memory, scales in zip((*self._memory.keys, *self._memory.values), kept, strict=True):
                self._scales(memory, rows)[:, :, : self.length] = scales

    def keep(self, index: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As the static engine's; what is new is read as it is, what was there as it was rounded."""
        if not self.key_scales:
            return super().keep(index, start, k, v)
        end = start + k.shape[2]
        kinds = (self.keys[index], self.key_scales[index], k), (self.values[index], self.value_scales[index], v)
        for numbers, scales, new in kinds:
            numbers[:, :, start:end], scales[:, :, start:end] = rounded(new)
        if not start:
            return k, v
        past = [numbers[:, :, :start] * scales[:, :, :start, None] for numbers, scales, _ in kinds]
        return torch.cat((past[0].to(k.dtype), k), dim=2), torch.cat((past[1].to(v.dtype), v), dim=2)

    def step(self, embeds: Tensor) -> Tensor:
        if self.length == self.capacity:
            self._reserve(embeds.shape[0], self.length + 1, embeds)
        self.position.fill_(self.length)
        hidden = self.static_step(embeds, self.length + 1)
        self.length += 1
        return hidden

    def static_step(self, embeds: Tensor, extent: int) -> Tensor:
        if not few(len(embeds)):
            return self.many(embeds, extent)
        if not self.why_several_launches(len(embeds)):
            return self.at_once(embeds[:, 0])
        buffers = self.buffers(embeds[:, 0].contiguous(), extent)
        self.rows = [torch.empty(0)] * len(self.heads)
        for index in range(len(self.blocks.layers)):
            self.qkv(index, buffers)
            for slot, (watched, head) in enumerate(self.heads):
                if watched == index:
                    self.rows[slot] = self.watched_row(buffers.q, index, head, extent)
            self.attend(index, buffers)
            self.output(index, buffers)
            self.gate_up(index, buffers)
            self.down(index, buffers)
        return self.normed(buffers.x)

    def why_several_launches(self, rows: int) -> str | None:
        """Why a step of so many rows is not a single kernel but for the last norm, in words; None if it is."""
        if self.heads:
            return "the multilingual guard watches the layers' attention, which a single kernel does not show"
        if rows > whole_step.MAX_ROWS or self.capacity > whole_step.MAX_SLOTS:
            return f"a single kernel takes {whole_step.MAX_ROWS} rows of {whole_step.MAX_SLOTS} slots at most"
        return self.several

    def at_once(self, embeds: Tensor) -> Tensor:
        """`static_step` from embeddings [R, C] on, in one launch."""
        assert self.whole is not None
        embeds = embeds.float().contiguous()
        x = torch.empty_like(embeds)
        self.whole(embeds, self.tables, self.position, self.pads, self.valid_slots, self.ended, x)
        return self.normed(x)

    def head(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """The speech head for few rows: its logits [R, V] of hidden states [R, C], in 8 bits where the layers are."""
        return partial(head_logits, Int8Linear.of(layer) if self.scaled else layer, tile=self.tiles["speech_head"])

    def many(self, embeds: Tensor, extent: int) -> Tensor:
        """`static_step` for more rows than these kernels take."""
        return super().static_step(embeds, extent) if self.scaled else triton_batched.step(self, embeds, extent)

    def buffers(self, embeds: Tensor, extent: int) -> Buffers:
        """What the kernels of one step hand on, from embeddings [R, C] on, which stay as they are."""
        like, heads = self.keys[0], self.blocks.heads
        x = torch.empty_like(embeds, dtype=torch.float32)
        if self._arrived is None:  # once and for any number of rows, as captured steps know where it lies
            self._arrived = torch.zeros(MAX_ROWS * heads, dtype=torch.int32, device=x.device)
        parts = x.new_empty(len(x), heads, triton.next_power_of_2(triton.cdiv(extent, self.tiles["attention"].outputs)))
        return Buffers(
            embeds=embeds,
            x=x,
            q=torch.empty_like(x),
            peaks=parts,
            totals=torch.empty_like(parts),
            sums=parts.new_empty(*parts.shape, like.shape[3]),
            attended=torch.empty_like(x),
            activated=like.new_empty(len(x), self.blocks.inner),
        )

    # -- one launch each -----------------------------------------------------------------------------------------

    def qkv(self, index: int, b: Buffers) -> None:
        layer, (rows, width) = self.tfmr.layers[index], b.x.shape
        attention, norm, tile = layer.self_attn, layer.input_layernorm, self.tiles["rmsnorm_qkv_rope"]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        args = (
            *(b.x if index else b.embeds, norm.weight),
            *(projection.weight for projection in projections),
            *(scale_of(projection) for projection in projections),
            *(*self.tables, b.q, self.keys[index], self.values[index]),
            *(self.position, self.pads, self.capacity, norm.variance_epsilon),
        )
        sizes = {"R": rows, "C": width, "D": attention.head_dim, "B": tile.outputs}
        sizes |= {"FIRST": index == 0, "SCALED": self.scaled}
        run(triton_decode.rmsnorm_qkv_rope, (width // (2 * tile.outputs), 3), args, sizes, tile.warps, self.overlap)

    def attend(self, index: int, b: Buffers) -> None:
        keys, tile = self.keys[index], self.tiles["attention"]
        rows, heads, _, head_dim = keys.shape
        valid, n_splits = self.valid_slots.view(torch.uint8), b.peaks.shape[2]
        args = (
            *(b.q, keys, self.values[index], self.position, valid, b.peaks, b.totals, b.sums, self._arrived),
            *(b.attended, self.capacity, n_splits, head_dim**-0.5),
        )
        sizes = {"H": heads, "D": head_dim, "BLOCK": tile.outputs, "TOGETHER": PARTS_TOGETHER}
        run(triton_decode.attention, (rows * heads, n_splits), args, sizes, tile.warps, self.overlap)

    def output(self, index: int, b: Buffers) -> None:
        product, before = self.tfmr.layers[index].self_attn.o_proj, b.x if index else b.embeds
        self._add_product(b.attended, product, before, b.x, self.tiles["o_residual"])

    def gate_up(self, index: int, b: Buffers) -> None:
        layer, (rows, width), inner = self.tfmr.layers[index], b.x.shape, b.activated.shape[1]
        norm, mlp, tile = layer.post_attention_layernorm, layer.mlp, self.tiles["rmsnorm_gate_up_silu"]
        args = (
            *(b.x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight),
            *(scale_of(mlp.gate_proj), scale_of(mlp.up_proj), b.activated, norm.variance_epsilon),
        )
        sizes = {"R": rows, "C": width, "M": inner, "B": tile.outputs, "SCALED": self.scaled}
        run(triton_decode.rmsnorm_gate_up_silu, (inner // tile.outputs,), args, sizes, tile.warps, self.overlap)

    def down(self, index: int, b: Buffers) -> None:
        self._add_product(b.activated, self.tfmr.layers[index].mlp.down_proj, b.x, b.x, self.tiles["down_residual"])

    def _add_product(self, rows: Tensor, product: Any, before: Tensor, x: Tensor, tile: Tile) -> None:
        width, biased = x.shape[1], product.bias is not None
        args = rows, matrix_of(product), scale_of(product), product.bias if biased else x, before, x
        sizes = {"R": len(rows), "C": width, "K": rows.shape[1], "B": tile.outputs}
        sizes |= {"BIAS": biased, "SCALED": self.scaled}
        run(triton_decode.product_residual, (width // tile.outputs,), args, sizes, tile.warps, self.overlap)

    def normed(self, x: Tensor) -> Tensor:
        """The last norm of the stream [R, C]."""
        norm, (rows, width), hidden = self.tfmr.norm, x.shape, torch.empty_like(x)
        args = x, norm.weight, hidden, norm.variance_epsilon
        run(triton_decode.final_rmsnorm, (rows,), args, {"C": width}, 4, self.overlap)
        return hidden


class GPT2Engine(TritonEngine):
    """The same for a GPT-2, by the kernels of `triton_gpt2.py` for few rows."""

    own_tiles = GPT2_TILES, GPT2_TILES_OF_8_BITS

    def qkv(self, index: int, b: Buffers) -> None:
        layer, (rows, width) = self.blocks.layers[index], b.x.shape
        norm, product, tile = layer.ln_1, layer.attn.c_attn, self.tiles["layernorm_qkv"]
        args = (
            *(b.x if index else b.embeds, self.tables[0], self.pads, b.x),
            *(norm.weight, norm.bias, matrix_of(product), scale_of(product), product.bias),
            *(b.q, self.keys[index], self.values[index], self.position, self.capacity, norm.eps),
        )
        sizes = {"R": rows, "C": width, "D": self.blocks.head_dim, "B": tile.outputs}
        sizes |= {"FIRST": index == 0, "SCALED": self.scaled}
        run(triton_gpt2.layernorm_qkv, (3 * width // tile.outputs,), args, sizes, tile.warps, self.overlap)

    def output(self, index: int, b: Buffers) -> None:
        self._add_product(b.attended, self.blocks.layers[index].attn.c_proj, b.x, b.x, self.tiles["o_residual"])

    def gate_up(self, index: int, b: Buffers) -> None:
        layer, (rows, width), inner = self.blocks.layers[index], b.x.shape, b.activated.shape[1]
        norm, product, tile = layer.ln_2, layer.mlp.c_fc, self.tiles["layernorm_gelu"]
        args = (
            *(b.x, norm.weight, norm.bias, matrix_of(product), scale_of(product), product.bias),
            *(b.activated, norm.eps),
        )
        sizes = {"R": rows, "C": width, "M": inner, "B": tile.outputs, "SCALED": self.scaled}
        run(triton_gpt2.layernorm_gelu, (inner // tile.outputs,), args, sizes, tile.warps, self.overlap)

    def down(self, index: int, b: Buffers) -> None:
        self._add_product(b.activated, self.blocks.layers[index].mlp.c_proj, b.x, b.x, self.tiles["down_residual"])

    def normed(self, x: Tensor) -> Tensor:
        norm, (rows, width), hidden = self.blocks.norm, x.shape, torch.empty_like(x)
        args = x, norm.weight, norm.bias, hidden, norm.eps
        run(triton_gpt2.final_layernorm, (rows,), args, {"C": width}, 4, self.overlap)
        return hidden


def engine_for(tfmr: nn.Module, bucket: int = 256, tiles: Tiles | None = None) -> TritonEngine:
    """The engine for one of T3's transformers."""
    return (GPT2Engine if isinstance(tfmr, GPT2Model) else TritonEngine)(tfmr, bucket, tiles)


def _several_launches(engine: TritonEngine, tiles: Tiles | None) -> str | None:
    """Why the step of `whole_step.py` cannot be had."""
    if tiles is not None:
        return "tiles were chosen, which a single kernel has none of"
    return whole_step.unsupported(engine.blocks, engine.device, engine.scaled)


def scale_of(product: Any) -> Tensor:
    """The outputs' scales of 8-bit weights; where there are none a kernel is given the weight, and does not read it."""
    return product.scale if isinstance(product, Int8Linear) else product.weight


def run(kernel: Any, grid: tuple[int, ...], args: tuple, sizes: dict[str, int], warps: int, overlap: bool) -> None:
    """Launch a kernel; with `overlap` it may start before the one in front of it has ended."""
    launch(kernel, grid, *args, **sizes, OVERLAP=overlap, num_warps=warps, launch_pdl=overlap)


def head_logits(head: Any, hidden: Tensor, tile: Tile = TILES["speech_head"]) -> Tensor:
    """The head's logits [R, V], float32, of hidden states [R, C]; the head is a linear layer or one in 8 bits."""
    (rows, width), size, scaled = hidden.shape, len(head.weight), isinstance(head, Int8Linear)
    logits, biased = torch.empty(rows, size, device=hidden.device), head.bias is not None
    args = hidden.contiguous(), head.weight, scale_of(head), head.bias if biased else logits, logits, size
    sizes = {"R": rows, "C": width, "B": tile.outputs, "BIAS": biased, "SCALED": scaled}
    grid = (triton.cdiv(size, tile.outputs),)
    run(triton_decode.speech_head, grid, args, sizes, tile.warps, can_overlap(hidden.device))
    return logits
