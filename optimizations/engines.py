"""Two ways to run T3's transformer: through transformers' own model, or through a flat function over a static cache.

Both take embeddings and give the last position's hidden state; the decoder above them does not care which it has.
Rows of shorter prompts are padded on the left (behind the voice's prefix, where there is one), so that all rows
write the same cache slot in every step; a row's positions still count its own tokens only.

Decoding one token is a matrix-vector product per weight: at batch 2 the arithmetic is nothing, the weights' bytes
and the kernel launches are everything. So the static engine does as little as possible besides: one rotation table,
one in-place write per layer, views instead of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaModel

Heads = tuple[tuple[int, int], ...]


class Engine(Protocol):
    """What the decoder asks of a transformer."""

    heads: Heads
    rows: list[Tensor]
    """After each call, one attention row [B, n, past + n] for each watched (layer, head): the n newest positions."""

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Any) -> Tensor:
        """Prompts [R, n, C], `pad` [R] slots of padding on the left (None: no padding) -> hidden [R, C]."""
        ...

    def step(self, embeds: Tensor) -> Tensor:
        """One more position [R, 1, C] -> hidden [R, C]."""
        ...


def attention_rows(q: Tensor, k: Tensor, mask: Tensor | None, n: int) -> Tensor:
    """Softmax rows of the `n` newest queries of one head: q [B, T, D], k [B, L, D] -> [B, n, L]."""
    scores = (q[:, -n:].float() @ k.float().transpose(1, 2)) * q.shape[-1] ** -0.5
    length = k.shape[1]
    newest = torch.arange(length - n, length, device=k.device)
    future = torch.arange(length, device=k.device) > newest[:, None]
    scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :length], -torch.inf)
    return scores.softmax(dim=-1)


class DynamicEngine:
    """transformers' model with its growing cache, asked for nothing but the last hidden state."""

    def __init__(self, tfmr: LlamaModel) -> None:
        self.tfmr: Any = tfmr  # torch types a module's attributes `Tensor | Module`, which no layer of it is
        self.heads: Heads = ()
        self.rows: list[Tensor] = []
        self._cache = DynamicCache(config=tfmr.config)
        self._valid: Tensor | None = None

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Any = None) -> Tensor:
        self._cache = DynamicCache(config=self.tfmr.config)
        self._valid = None
        if pad is not None:
            self._valid = torch.arange(embeds.shape[1], device=embeds.device) >= pad[:, None]
        return self._run(embeds, newest=2)

    def step(self, embeds: Tensor) -> Tensor:
        if self._valid is not None:
            self._valid = F.pad(self._valid, (0, 1), value=True)
        return self._run(embeds, newest=1)

    def _run(self, embeds: Tensor, newest: int) -> Tensor:
        positions = None
        if self._valid is not None:
            positions = (self._valid.long().cumsum(dim=1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        with self._watched() as seen:
            hidden = self.tfmr(
                inputs_embeds=embeds,
                attention_mask=self._valid,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        self.rows = [self._row(*seen[layer], layer, head, newest) for layer, head in self.heads]
        return hidden[:, -1]

    @contextmanager
    def _watched(self) -> Iterator[dict[int, tuple[Tensor, tuple[Tensor, Tensor]]]]:
        """Catch what enters the watched layers' attention; the hooks are gone when the call is over."""
        seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        handles = []
        for layer in {layer for layer, _ in self.heads}:

            def catch(_module: nn.Module, _args: tuple, kwargs: dict, layer: int = layer) -> None:
                seen[layer] = (kwargs["hidden_states"], kwargs["position_embeddings"])

            attention = self.tfmr.layers[layer].self_attn
            handles.append(attention.register_forward_pre_hook(catch, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _row(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], layer: int, head: int, newest: int) -> Tensor:
        """The watched head's newest attention rows, for the conditional half of the batch."""
        attention = self.tfmr.layers[layer].self_attn
        rows, dim = hidden.shape[0] // 2, attention.head_dim
        newest = min(newest, hidden.shape[1])
        cos, sin = (r[:rows] if r.shape[0] > 1 else r for r in rotation)
        q = attention.q_proj(hidden[:rows, -newest:])[..., head * dim : (head + 1) * dim]
        q = q * cos[:, -newest:] + _rotate_half(q) * sin[:, -newest:]
        keys = self._cache.layers[layer].keys
        assert keys is not None
        k = keys[:rows, head]
        return attention_rows(q, k, None if self._valid is None else self._valid[:rows], newest)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.stack((-second, first), dim=-2).flatten(-2)


class StaticEngine:
    """The same layers as a flat function that writes keys and values into preallocated memory.

    The cache is one tensor [R, heads, capacity, head_dim] per layer and kind, so that a slot is written in place and
    the filled part is read as a view: nothing is concatenated and nothing of the cache is allocated per token.
    Capacity grows by whole buckets; it is kept between utterances. Fewer rows than there is memory for use the first
    rows of it, so that the memory stays where it is.

    `step` reads only what is filled, so its shapes grow with every token. `fixed_step` is the same mathematics in
    shapes that stay: it reads a whole bucket of slots and masks those to come. What changes from token to token is
    kept on the device, so that a recorded step can be run again as it is.
    """

    def __init__(self, tfmr: LlamaModel, bucket: int = 256) -> None:
        self.tfmr: Any = tfmr  # torch types a module's attributes `Tensor | Module`, which no layer of it is
        self.bucket = bucket
        self.heads: Heads = ()
        self.rows: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.length = 0
        self.moves = 0
        """How often the cache came to lie elsewhere in memory; whoever recorded addresses has to start again."""
        self.position = torch.zeros(1, dtype=torch.long)
        """The slot that the next fixed step writes, [1] on the device."""
        self.pads = torch.zeros(0, dtype=torch.long)
        """Slots of padding in each row, [R] on the device; 0 where there is none."""
        self.valid_slots = torch.zeros(0, 0, dtype=torch.bool)
        """Which slots a row may look at, [R, capacity] on the device: all but its padding."""
        self._memory = _Memory()
        self._n_prefix = 0
        self._pad: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    @property
    def capacity(self) -> int:
        """Positions that the cache can hold."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return sum(t.nbytes for t in (*self._memory.keys, *self._memory.values))

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """See Engine. `prefix` holds keys and values [1 or R, heads, p, head_dim] per layer that open the rows."""
        self.begin(embeds, pad, prefix)
        return self.read(embeds, self.length)

    def begin(self, embeds: Tensor, pad: Tensor | None, prefix: list[tuple[Tensor, Tensor]] | None) -> None:
        """All of `prefill` but the prompts themselves: room, padding, and what the rows open with."""
        self.length = 0
        self._n_prefix = 0 if prefix is None else prefix[0][0].shape[2]
        self._reserve(embeds.shape[0], self._n_prefix + embeds.shape[1], embeds)
        self._set_padding(pad)
        for index, (k, v) in enumerate(prefix or []):
            self.keys[index][:, :, : self._n_prefix] = k
            self.values[index][:, :, : self._n_prefix] = v
        self.length = self._n_prefix

    def read(self, embeds: Tensor, start: int) -> Tensor:
        """Prompts [R, n, C], from the slot `start` on -> hidden [R, C]. With padding set, it can be captured."""
        self.length = start
        hidden = self._run(embeds, newest=2)
        self.position.fill_(self.length)
        return hidden

    def step(self, embeds: Tensor) -> Tensor:
        if self.length == self.capacity:
            self._reserve(embeds.shape[0], self.length + 1, embeds)
        return self._run(embeds, newest=1)

    def fixed_step(self, embeds: Tensor, extent: int) -> Tensor:
        """One more position [R, 1, C] at the slot `position` -> hidden [R, C], reading the slots [0, extent).

        Reads and changes nothing on the host but the shapes, so that it can be captured; `position` is for the caller
        to move on.
        """
        turned = (self.position - self.pads).clamp_min(0)
        rotation = self._cos[turned][:, None, None], self._sin[turned][:, None, None]
        slots = torch.arange(extent, device=embeds.device)
        visible = self.valid_slots[:, :extent] & (slots <= self.position)
        # As numbers to add, worked out once: every layer would turn a mask of truth values into them for itself.
        mask = torch.zeros(visible.shape, dtype=self.keys[0].dtype, device=embeds.device)
        mask = mask.masked_fill_(~visible, -torch.inf)[:, None, None]

        def write(cache: Tensor, new: Tensor) -> None:
            cache.index_copy_(2, self.position, new)

        return self._layers(embeds, rotation, write, extent, mask, causal=False, newest=1, visible=visible)

    def prefix(self, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer of a voice's opening embeddings [1, p, C]; they do not depend on what follows."""
        self.length = self._n_prefix = 0
        self._reserve(1, embeds.shape[1], embeds)
        self._set_padding(None)
        self._run(embeds, newest=1)
        end = self.length
        return [(k[:1, :, :end].clone(), v[:1, :, :end].clone()) for k, v in zip(self.keys, self.values, strict=True)]

    def reserve(self, rows: int, length: int) -> None:
        """Have memory for `length` positions in `rows` rows, for prompts to come."""
        self.length = 0
        self._reserve(rows, length, self.tfmr.norm.weight)
        self._set_padding(None)

    def extend(self, filled: int, length: int) -> None:
        """Have memory for `length` positions, of which the first `filled` hold the current prompt and its tokens."""
        self.length = filled
        self._reserve(self.keys[0].shape[0], length, self.keys[0])

    def _set_padding(self, pad: Tensor | None) -> None:
        """Rows are laid out as prefix, padding, prompt, new tokens."""
        self._pad = pad
        if pad is None:
            self.pads.zero_()
            self.valid_slots.fill_(True)
        else:
            slots = torch.arange(self.capacity, device=pad.device)
            self.pads.copy_(pad)
            self.valid_slots.copy_((slots < self._n_prefix) | (slots >= self._n_prefix + pad[:, None]))

    def _reserve(self, rows: int, length: int, like: Tensor) -> None:
        """Make room for `length` positions in `rows` rows, keeping what the cache holds of the current prompt."""
        dtype = self.tfmr.layers[0].input_layernorm.weight.dtype
        held = self._memory
        if not held.fits(rows, length, dtype, like.device):
            capacity = held.capacity if length <= held.capacity else -(-(length + 1) // self.bucket) * self.bucket
            self._memory = held.grown(self.tfmr.config, max(rows, held.rows), capacity, dtype, like.device, self.length)
            self.moves += 1
            self._tabulate_rotation(capacity, like.to(dtype))
            if self.position.device != like.device:
                self.position = torch.zeros(1, dtype=torch.long, device=like.device)
        elif self.keys and self.keys[0].shape[0] == rows:
            return
        memory = self._memory
        self.keys, self.values = [k[:rows] for k in memory.keys], [v[:rows] for v in memory.values]
        self.pads, self.valid_slots = memory.pads[:rows], memory.valid_slots[:rows]
        if self.length:
            self._set_padding(self._pad)

    def _tabulate_rotation(self, capacity: int, like: Tensor) -> None:
        """Rotation as x * cos + swapped(x) * sin, with the sign of the swapped first half kept in the table."""
        cos, sin = self.tfmr.rotary_emb(like, torch.arange(capacity, device=like.device)[None])
        half = sin.shape[-1] // 2
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def _run(self, embeds: Tensor, newest: int) -> Tensor:
        """All layers over `embeds` [R, n, C] at the next slots -> last hidden state [R, C]."""
        start, end = self.length, self.length + embeds.shape[1]
        mask, causal = self._mask(start, end)

        def write(cache: Tensor, new: Tensor) -> None:
            cache[:, :, start:end] = new

        visible = None if self._pad is None else self.valid_slots[:, :end]
        hidden = self._layers(embeds, self._rotation(start, end), write, end, mask, causal, newest, visible)
        self.length = end
        return hidden

    def _layers(
        self,
        embeds: Tensor,
        rotation: tuple[Tensor, Tensor],
        write: Callable[[Tensor, Tensor], None],
        end: int,
        mask: Tensor | None,
        causal: bool,
        newest: int,
        visible: Tensor | None,
    ) -> Tensor:
        """`embeds` [R, n, C] through all layers -> last hidden state [R, C].

        Args:
            rotation: cosines and sines that broadcast over [R, heads, n, head_dim].
            write: puts new keys or values [R, heads, n, head_dim] into a layer's cache.
            end: attention reads the slots [0, end).
            mask: of the new positions over those slots, as `scaled_dot_product_attention` takes it.
            newest: positions of which the watched heads' rows are kept,
            visible: and the slots [R, end) that those may look at, beside what causality says; None if all.
        """
        cos, sin = rotation
        x = embeds.to(self.keys[0].dtype)
        self.rows = [torch.empty(0)] * len(self.heads)
        for index, layer in enumerate(self.tfmr.layers):
            attention = layer.self_attn
            h = _rms_norm(x, layer.input_layernorm)
            q, k, v = (
                _heads(project(h), attention.head_dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = q * cos + _swap_halves(q) * sin, k * cos + _swap_halves(k) * sin
            write(self.keys[index], k)
            write(self.values[index], v)
            keys, values = self.keys[index][:, :, :end], self.values[index][:, :, :end]
            for slot, (watched, head) in enumerate(self.heads):
                if watched == index:
                    self.rows[slot] = _watch(q, keys, head, newest, visible)
            h = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
            x = x + attention.o_proj(h.transpose(1, 2).flatten(2))
            h = _rms_norm(x, layer.post_attention_layernorm)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        return _rms_norm(x[:, -1], self.tfmr.norm)

    def _rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        if self._pad is None:
            return self._cos[start:end], self._sin[start:end]
        positions = (torch.arange(start, end, device=self.pads.device) - self.pads[:, None]).clamp_min_(0)
        return self._cos[positions][:, None], self._sin[positions][:, None]

    def _mask(self, start: int, end: int) -> tuple[Tensor | None, bool]:
        """The attention mask for the new slots, and whether plain causality says it all."""
        valid = None if self._pad is None else self.valid_slots[:, None, None, :end]
        if end - start == 1:
            return valid, False
        if start == 0 and valid is None:
            return None, True
        slots = torch.arange(end, device=self.keys[0].device)
        mask = (slots <= slots[start:end, None])[None, None]
        if valid is not None:
            # A padded slot may look at itself, or its softmax would be over nothing.
            mask = mask & valid | (slots == slots[start:end, None])
        return mask, False


@dataclass
class _Memory:
    """The static engine's memory: for every layer keys and values, and what goes with the rows."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pads: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    valid_slots: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    @property
    def rows(self) -> int:
        return len(self.pads)

    @property
    def capacity(self) -> int:
        return self.valid_slots.shape[1]

    def fits(self, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> bool:
        if not self.keys or self.keys[0].dtype != dtype or self.keys[0].device != device:
            return False
        return self.rows >= rows and self.capacity >= length

    def grown(
        self, config: Any, rows: int, capacity: int, dtype: torch.dtype, device: torch.device, filled: int
    ) -> _Memory:
        """Memory of that size with the first `filled` slots of this one."""
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)

        def layers(old: list[Tensor]) -> list[Tensor]:
            # Zeros, because a masked slot still takes part with weight 0, and 0 times what lies in fresh memory
            # may be NaN.
            new = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            for grown, held in zip(new, old, strict=False):
                grown[: held.shape[0], :, :filled] = held[:, :, :filled]
            return new

        return _Memory(
            layers(self.keys),
            layers(self.values),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.ones(rows, capacity, dtype=torch.bool, device=device),
        )


def _watch(q: Tensor, keys: Tensor, head: int, newest: int, visible: Tensor | None) -> Tensor:
    """A head's newest attention rows, for the conditional half of the batch."""
    rows = q.shape[0] // 2
    return attention_rows(
        q[:rows, head], keys[:rows, head], None if visible is None else visible[:rows], min(newest, q.shape[2])
    )


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[R, n, heads * head_dim] -> [R, heads, n, head_dim]"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _swap_halves(x: Tensor) -> Tensor:
    """The two halves of the last dimension exchanged, in one kernel and without `cat`."""
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
