"""T3's transformer as a flat function, over a cache that grows or over one that stays where it is.

Engines take embeddings and give the last position's hidden state; the decoder above them does not care which it has.
Rows of shorter prompts are padded on the left (behind the voice's prefix, where there is one), so that all rows
write the same cache slot in every step; a row's positions still count its own tokens only.

Decoding one token is a matrix-vector product per weight: at batch 2 the arithmetic is nothing, the weights' bytes
and the kernel launches are everything. So the function does as little as possible besides: tables of positions, views
instead of copies, none of what transformers' own model keeps a book of. The growing cache is what upstream has, two
`cat`s per layer and token; the static one is written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizations.common.padding import padded_length
from optimizations.t3.blocks import Places, blocks_of

MANY_ROWS = 16
BUCKET_OF_MANY = 32
"""Positions by which the cache of more rows than that grows: 32 of 128 rows are 0.5 GB of bfloat16 at full size."""
Heads = tuple[tuple[int, int], ...]
Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values [1 or R, heads, p, head_dim] per layer that rows open with."""
Store = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's number and its new keys and values [R, heads, n, head_dim]; gives those that attention reads."""


class Engine(Protocol):
    """What the decoder asks of a transformer."""

    heads: Heads
    sides: int
    """Rows that a segment takes: the watched ones are those of the first side."""
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


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values as numbers to add to the scores; every layer would turn it into them for itself."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class FlatEngine:
    """The transformer's layers as one flat function; where keys and values are kept is a subclass's matter.

    transformers' own model does the same arithmetic in twice as many kernels, and on a fast GPU a decode step's time
    is the time to launch its kernels.
    """

    def __init__(self, tfmr: nn.Module) -> None:
        self.tfmr: Any = tfmr  # torch types a module's attributes `Tensor | Module`, which no layer of it is
        self.blocks = blocks_of(tfmr)
        self.heads: Heads = ()
        self.sides = 2
        self.rows: list[Tensor] = []
        self.length = 0
        self.pads = torch.zeros(0, dtype=torch.long)
        """Slots of padding in each row, [R] on the device; 0 where there is none."""
        self.valid_slots = torch.zeros(0, 0, dtype=torch.bool)
        """Which slots a row may look at, [R, capacity] on the device: all but its padding."""
        self._pad: Tensor | None = None
        self.tables: tuple[Tensor, ...] = ()
        """What the blocks know of positions, for as many as there are slots."""

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        return self.blocks.dtype

    def _run(self, embeds: Tensor, store: Store, newest: int) -> Tensor:
        """All layers over `embeds` [R, n, C] at the next slots -> last hidden state [R, C]."""
        start, end = self.length, self.length + embeds.shape[1]
        mask, causal = self._mask(start, end)
        visible = None if self._pad is None else self.valid_slots[:, :end]
        hidden = self._layers(embeds, self._places(start, end), store, mask, causal, newest, visible)
        self.length = end
        return hidden

    def _layers(
        self,
        embeds: Tensor,
        places: Places,
        store: Store,
        mask: Tensor | None,
        causal: bool,
        newest: int,
        visible: Tensor | None,
    ) -> Tensor:
        """`embeds` [R, n, C] through all layers -> last hidden state [R, C].

        Args:
            places: what the blocks know of the new positions.
            store: keeps a layer's new keys and values and gives those that attention reads.
            mask: of the new positions over the slots, as `scaled_dot_product_attention` takes it.
            newest: positions of which the watched heads' rows are kept,
            visible: and the slots [R, end) that those may look at, beside what causality says; None if all.
        """
        blocks = self.blocks
        x = blocks.enter(embeds.to(self.dtype), places)
        self.rows = [torch.empty(0)] * len(self.heads)
        for index, layer in enumerate(blocks.layers):
            q, k, v = blocks.heads_of(layer, x, places)
            keys, values = store(index, k, v)
            for slot, (watched, head) in enumerate(self.heads):
                if watched == index:
                    rows = q.shape[0] // self.sides
                    seen = None if visible is None else visible[:rows]
                    self.rows[slot] = attention_rows(q[:rows, head], keys[:rows, head], seen, min(newest, q.shape[2]))
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
            x = blocks.add_attended(layer, x, attended.transpose(1, 2).flatten(2))
            x = blocks.add_inner(layer, x)
        return blocks.leave(x[:, -1])

    def _places(self, start: int, end: int) -> Places:
        if self._pad is None:
            return tuple(table[start:end] for table in self.tables)
        positions = (torch.arange(start, end, device=self.pads.device) - self.pads[:, None]).clamp_min_(0)
        return tuple(table[positions] for table in self.tables)

    def _mask(self, start: int, end: int) -> tuple[Tensor | None, bool]:
        """The attention mask for the new slots, and whether plain causality says it all."""
        valid = None if self._pad is None else self.valid_slots[:, None, None, :end]
        if end - start == 1:
            return valid, False
        if start == 0 and valid is None:
            return None, True
        slots = torch.arange(end, device=self.blocks.norm.weight.device)
        mask = (slots <= slots[start:end, None])[None, None]
        if valid is not None:
            # A padded slot may look at itself, or its softmax would be over nothing.
            mask = mask & valid | (slots == slots[start:end, None])
        return mask, False


class GrowingEngine(FlatEngine):
    """A cache that grows by `cat`, as upstream's: each token copies all that is there."""

    def __init__(self, tfmr: nn.Module) -> None:
        super().__init__(tfmr)
        self._cache: list[tuple[Tensor, Tensor]] = []

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: None = None) -> Tensor:
        """See Engine; it keeps no prefix."""
        self.length, self._cache, self._pad = 0, [], pad
        self._tabulate(embeds.shape[1], embeds)
        return self._run(embeds, self._store, newest=2)

    def step(self, embeds: Tensor) -> Tensor:
        if self.length >= len(self.tables[0]):
            self._tabulate(self.length + 1, embeds)
        return self._run(embeds, self._store, newest=1)

    def _store(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if index == len(self._cache):
            self._cache.append((k, v))
        else:
            keys, values = self._cache[index]
            self._cache[index] = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        return self._cache[index]

    def _tabulate(self, length: int, like: Tensor) -> None:
        """Tables for `length` positions and as many to come."""
        capacity = 2 * length
        self.tables = self.blocks.tables(capacity, like.to(self.dtype))
        if self._pad is not None:
            self.pads = self._pad
            self.valid_slots = torch.arange(capacity, device=like.device) >= self.pads[:, None]


class StaticEngine(FlatEngine):
    """The same layers as a flat function that writes keys and values into preallocated memory.

    The cache is one tensor [R, heads, capacity, head_dim] per layer and kind, so that a slot is written in place and
    the filled part is read as a view: nothing is concatenated and nothing of the cache is allocated per token.
    The memory behind it is a number of slots, kept between utterances, which rows share out among themselves: few rows
    have room for long utterances in what many take for shorter ones. It grows by whole buckets, for many rows by fewer
    slots, and stays where it is unless it grows.

    `step` reads only what is filled, so its shapes grow with every token. `static_step` is the same mathematics in
    shapes that stay: it reads a whole bucket of slots and masks those to come. What changes from token to token is
    kept on the device, so that a recorded step can be run again as it is.
    """

    def __init__(self, tfmr: nn.Module, bucket: int = 256) -> None:
        super().__init__(tfmr)
        self.bucket = bucket
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.key_scales: list[Tensor] = []
        self.value_scales: list[Tensor] = []
        """Of a cache in 8 bits [R, heads, capacity]; none where it is of floats."""
        self.moves = 0
        """How often the cache came to lie elsewhere in memory; whoever recorded addresses has to start again."""
        self.position = torch.zeros(1, dtype=torch.long)
        """The slot that the next fixed step writes, [1] on the device."""
        self.ended: Tensor | None = None
        """Which utterances are over [B], truth values on the device, while a loop runs that may step beyond their end;
        a step that nobody will hear need not do anything."""
        self._memory = _Memory()
        self._n_prefix = 0
        self._opened: tuple[Prefix, int, int, int, int] | None = None
        """The prefix that rows still open with, how many rows, their slots, a slot's bytes and the moves until then."""

    @property
    def capacity(self) -> int:
        """Positions that the cache can hold."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return sum(t.nbytes for t in (*self._memory.keys, *self._memory.values))

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Prefix | None = None) -> Tensor:
        """See Engine."""
        self.begin(embeds, pad, prefix)
        return self.read(embeds, self.length)

    def begin(self, embeds: Tensor, pad: Tensor | None, prefix: Prefix | None) -> None:
        """All of `prefill` but the prompts themselves: room, padding, and what the rows open with."""
        self.length = 0
        self._n_prefix = 0 if prefix is None else prefix[0][0].shape[2]
        self._reserve(embeds.shape[0], self._n_prefix + embeds.shape[1], embeds)
        self._set_padding(pad)
        self._open(prefix)
        self.length = self._n_prefix

    def _open(self, prefix: Prefix | None) -> None:
        """Have all rows begin with the prefix. What the last prompt began with is there still, and not copied again."""
        if prefix is None:
            self._opened = None
            return
        rows = len(self.pads)
        place = self.capacity, self.slot_bytes(rows), self.moves
        if (opened := self._opened) is None or opened[0] is not prefix or opened[1] < rows or opened[2:] != place:
            for index, (k, v) in enumerate(prefix):
                self.keep(index, 0, k, v)
            self._opened = prefix, rows, *place

    def read(self, embeds: Tensor, start: int) -> Tensor:
        """Prompts [R, n, C], from the slot `start` on -> hidden [R, C]. With padding set, it can be captured."""
        self.length = start
        hidden = self._run_here(embeds, newest=2)
        self.position.fill_(self.length)
        return hidden

    def step(self, embeds: Tensor) -> Tensor:
        if self.length == self.capacity:
            self._reserve(embeds.shape[0], self.length + 1, embeds)
        return self._run_here(embeds, newest=1)

    def static_step(self, embeds: Tensor, extent: int) -> Tensor:
        """One more position [R, 1, C] at the slot `position` -> hidden [R, C], reading the slots [0, extent).

        Reads and changes nothing on the host but the shapes, so that it can be captured; `position` is for the caller
        to move on.
        """
        turned = (self.position - self.pads).clamp_min(0)
        places = tuple(table[turned][:, None] for table in self.tables)
        slots = torch.arange(extent, device=embeds.device)
        visible = self.valid_slots[:, :extent] & (slots <= self.position[:, None])
        mask = as_numbers(visible[:, None, None], self.keys[0].dtype)

        def store(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self.keys[index], self.values[index]
            self._write(keys, k)
            self._write(values, v)
            return keys[:, :, :extent], values[:, :, :extent]

        return self._layers(embeds, places, store, mask, causal=False, newest=1, visible=visible)

    def _write(self, cache: Tensor, new: Tensor) -> None:
        """Keys or values of a static step [R, heads, 1, head_dim] at `position`."""
        cache.index_copy_(2, self.position, new)

    def watched_row(self, queries: Tensor, index: int, head: int, extent: int) -> Tensor:
        """The newest attention row [R / sides, 1, extent] of a watched head of a static step, from its layer's rotated
        queries [R, C]; slots to come have weight 0."""
        rows, keys = queries.shape[0] // self.sides, self.keys[index]
        query = queries[:rows].unflatten(-1, (-1, keys.shape[-1]))[:, head, None]
        slots = torch.arange(extent, device=queries.device)
        visible = self.valid_slots[:rows, :extent] & (slots <= self.position)
        return attention_rows(query, keys[:rows, head, :extent], visible, 1)

    def prefix(self, embeds: Tensor) -> Prefix:
        """Keys and values per layer of a voice's opening embeddings [1, p, C]; they do not depend on what follows."""
        self.length = self._n_prefix = 0
        self._opened = None
        self._reserve(1, embeds.shape[1], embeds)
        self._set_padding(None)
        self._run_here(embeds, newest=1)
        end = self.length
        return [(k[:1, :, :end].clone(), v[:1, :, :end].clone()) for k, v in zip(self.keys, self.values, strict=True)]

    def reserve(self, rows: int, length: int) -> None:
        """Have memory for `length` positions in `rows` rows, for prompts to come; nothing of it is kept."""
        self.length = 0
        self._opened = None
        self._reserve(rows, length, self.blocks.norm.weight)
        for cache in (*self._memory.keys, *self._memory.values):
            cache.zero_()  # as fresh memory is: see `_grow`
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
        memory = self._memory
        if not (memory.holds(rows, self.dtype, like.device) and length <= self._capacity(rows)):
            self._grow(rows, length, like)
        elif self.keys and self.keys[0].shape[:3:2] == (rows, self._capacity(rows)):
            return
        else:
            self.keys = [self._view(slots, rows) for slots in memory.keys]
            self.values = [self._view(slots, rows) for slots in memory.values]
        capacity = self._capacity(rows)
        self.pads, self.valid_slots = memory.pads[:rows], memory.valid[: rows * capacity].view(rows, capacity)
        if self.length:
            self._set_padding(self._pad)

    def _grow(self, rows: int, length: int, like: Tensor) -> None:
        """Memory for `length` positions in `rows` rows: layer after layer, so that none but one is there twice."""
        memory, filled, blocks = self._memory, self.length, self.blocks
        memory.widen(rows, length, self.slot_bytes(rows), self.bucket, self.dtype, like.device)
        for slots, views in ((memory.keys, self.keys), (memory.values, self.values)):
            if not filled:  # nothing to keep: what there was makes room first
                slots.clear()
                views.clear()
            for index in range(len(blocks.layers)):
                # Zeros, because a masked slot still takes part with weight 0, and 0 times what lies in fresh memory
                # may be NaN.
                new = torch.zeros(memory.n_bytes, dtype=torch.uint8, device=like.device)
                view = self._view(new, rows)
                if filled:
                    view[: len(views[index]), :, :filled] = views[index][:, :, :filled]
                slots[index : index + 1], views[index : index + 1] = [new], [view]
        self.moves += 1
        self.tables = blocks.tables(memory.longest, like.to(self.dtype))
        if self.position.device != like.device:
            self.position = torch.zeros(1, dtype=torch.long, device=like.device)

    def slot_bytes(self, rows: int) -> int:
        """Memory of a layer's keys, or values, in one slot of a row, where there are so many rows."""
        return self.blocks.heads * self.blocks.head_dim * self.dtype.itemsize

    def _capacity(self, rows: int) -> int:
        """Slots that each of so many rows has in the memory that is there."""
        return self._memory.capacity(rows, self.slot_bytes(rows))

    def _view(self, memory: Tensor, rows: int) -> Tensor:
        """Keys or values of a layer [R, heads, capacity, head_dim] in its bytes."""
        heads, head_dim, capacity = self.blocks.heads, self.blocks.head_dim, self._capacity(rows)
        own = memory[: rows * capacity * self.slot_bytes(rows)].view(self.dtype)
        return own.view(rows, heads, capacity, head_dim)

    def keep(self, index: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values [R or 1, heads, n, head_dim] from the slot `start` on; returns all so far."""
        keys, values, end = self.keys[index], self.values[index], start + k.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def _run_here(self, embeds: Tensor, newest: int) -> Tensor:
        """All layers over `embeds` at the next slots, which are written in place and read as views."""
        start = self.length
        return self._run(embeds, lambda index, k, v: self.keep(index, start, k, v), newest)


@dataclass
class _Memory:
    """The static engine's memory: for every layer bytes for keys and values, and what goes with the rows.

    So many rows as there are share the bytes out among themselves, for at most `longest` slots each.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pads: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    valid: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    longest: int = 0
    n_bytes: int = 0
    dtype: torch.dtype | None = None

    def holds(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it was made for as many rows, of an engine that computes in `dtype` there."""
        return bool(self.keys) and self.keys[0].device == device and self.dtype == dtype and rows <= len(self.pads)

    def capacity(self, rows: int, slot_bytes: int) -> int:
        """Slots of that size for each of `rows` rows."""
        return min(self.longest, self.n_bytes // (rows * slot_bytes))

    def widen(
        self, rows: int, length: int, slot_bytes: int, bucket: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Count with `length` positions in `rows` rows; the layers' bytes are for the caller to make.

        Few rows get as many slots as any ever had, which costs little, and so grow seldom.
        """
        if rows > MANY_ROWS:
            capacity = padded_length(length + 1, min(bucket, BUCKET_OF_MANY))
        else:
            capacity = max(padded_length(length + 1, bucket), self.longest)
        self.n_bytes = max(self.n_bytes, rows * capacity * slot_bytes)
        self.longest = max(self.longest, capacity)
        self.dtype = dtype
        self.pads = torch.zeros(max(rows, len(self.pads)), dtype=torch.long, device=device)
        self.valid = torch.ones(len(self.pads) * self.longest, dtype=torch.bool, device=device)
