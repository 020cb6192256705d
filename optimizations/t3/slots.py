"""T3's decode step for requests that come and go: a fixed number of places, each at its own position.

A batch that was read together goes on together: all its rows write the same slot of the cache, and whoever comes later
waits for the last of them. Here a row has a position of its own, so a request is read into a place as soon as one is
free, between two steps of the others, and leaves it when it is said. A step's shapes never change, and what it needs to
know is on the device: which places are taken, how far each of them is, whose random numbers it draws. So it is captured
once. A place that nobody has goes along, writes over itself, and stays as it is.

A row's arithmetic is what it is alone, and its random numbers are a function of its request's seed and of how far it
is (`sampling.times_of`): what a request says does not depend, but for rounding, on who is there with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE
from torch import Tensor

from harness.pipeline import HELD_BACK, Segment
from optimizations.common.graphs import Graphs
from optimizations.common.kernels import for_device
from optimizations.t3.decoder import Decoder
from optimizations.t3.engines import GrowingEngine, Prefix, StaticEngine
from optimizations.t3.sampling import Filters, SamplingTensors, guide, sample_by, times_of

STAGE = "slots"


class SlotEngine(StaticEngine):
    """The static engine with a position for each row; see `StaticEngine.static_step`."""

    def __init__(self, tfmr: Any, rows: int, capacity: int) -> None:
        super().__init__(tfmr, bucket=capacity)
        self.reserve(rows, capacity - 1)
        device = self.keys[0].device
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self._each = torch.arange(rows, device=device)

    def _write(self, cache: Tensor, new: Tensor) -> None:
        cache[self._each, :, self.position] = new[:, :, 0]

    def keep(self, rows: Tensor, lengths: Tensor, reader: PromptReader) -> None:
        """Have rows [n] hold the prompts, of `lengths` [n], that `reader` has read, without their padding."""
        slots = torch.arange(int(lengths.max()), device=rows.device)
        where = slots + torch.where(slots < reader.n_prefix, 0, reader.padding[:, None])
        for index, (k, v) in enumerate(reader.cache):
            at = where.clamp_max(k.shape[2] - 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            self.keys[index][rows, :, : len(slots)] = k.gather(2, at)
            self.values[index][rows, :, : len(slots)] = v.gather(2, at)
        self.position[rows] = lengths


class PromptReader(GrowingEngine):
    """Reads prompts and keeps what they leave: keys and values [R, heads, n, head_dim] a layer."""

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Prefix | None = None) -> Tensor:
        """See `Engine`; rows are laid out as prefix, padding, prompt."""
        rows, self._pad = len(embeds), pad
        self.n_prefix = self.length = prefix[0][0].shape[2] if prefix else 0
        self.padding = embeds.new_zeros(rows, dtype=torch.long) if pad is None else pad
        self._cache = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in prefix or []]
        self._tabulate(self.n_prefix + embeds.shape[1], embeds)
        slots = torch.arange(len(self.tables[0]), device=embeds.device)
        self.valid_slots = (slots < self.n_prefix) | (slots >= self.n_prefix + self.padding[:, None])
        return self._run(embeds, self._store, newest=1)

    @property
    def cache(self) -> Prefix:
        return self._cache


@dataclass
class Places:
    """What a step leaves on the device for the next one: B places, V ids, C wide, at most `limit` tokens each."""

    hidden: Tensor  # [sides B, C]: by which the next token is chosen
    embeds: Tensor  # [sides B, 1, C]: the newest token's
    tokens: Tensor  # [B, limit]
    written: Tensor  # [B]: how many
    wanted: Tensor  # [B]: how many at most
    seen: Tensor  # [B, V]: ids that are there
    pinned: Tensor  # [B, 1]: whether `wanted` is the number, and not the most
    running: Tensor  # [B]: whether a place is taken and goes on
    seeds: Tensor  # [B]

    @classmethod
    def blank(cls, n: int, sides: int, limit: int, table: Tensor, n_ids: int) -> Places:
        def numbers(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=table.device)

        return cls(
            hidden=table.new_zeros(sides * n, table.shape[1]),
            embeds=table.new_zeros(sides * n, 1, table.shape[1]),
            tokens=numbers(n, limit),
            written=numbers(n),
            wanted=numbers(n),
            seen=numbers(n, n_ids, dtype=torch.bool),
            pinned=numbers(n, 1, dtype=torch.bool),
            running=numbers(n, dtype=torch.bool),
            seeds=numbers(n),
        )


class Slots:
    """Decodes for a `Decoder` in `n` places, with prompts of up to `longest` positions; `graphs` run the steps."""

    def __init__(self, decoder: Decoder, n: int, longest: int, graphs: Graphs) -> None:
        self.decoder, self.n, self.graphs = decoder, n, graphs
        self.free = list(range(n))[::-1]
        self.n_steps = 0
        pipeline, t3 = decoder.pipeline, decoder.t3
        self._device, self._sides, self._longest = pipeline.device, decoder.sides, longest
        limit = pipeline.sampling.max_new_tokens
        self._step_of_engine = self._kernels_or_layers()
        self._engine = SlotEngine(t3.tfmr, self._sides * n, longest + limit + 1)
        self._reader = PromptReader(t3.tfmr)
        self._settings = SamplingTensors(self._device)
        self._settings.set(pipeline.sampling)
        self._filters = Filters.of(pipeline.sampling)
        table = t3.speech_emb.weight
        self._places = Places.blank(n, self._sides, limit, table, t3.speech_head.out_features)
        self._reached: dict[int, int] = {}
        """The newest position of each place that goes on, at most."""
        self._beyond = torch.arange(t3.speech_head.out_features, device=self._device) >= SPEECH_VOCAB_SIZE

    def _kernels_or_layers(self) -> Any:
        """One step of all rows: by the Triton kernels for many rows where the decoder has those for few."""
        kernels = for_device("optimizations.t3.triton_engine", self._device)
        engine: Any = self.decoder.engine
        if kernels is None or type(engine) is not kernels.TritonEngine or engine.scaled:
            return StaticEngine.static_step
        if kernels.triton_batched.join(self.decoder.t3.tfmr):
            engine.moves += 1
        return kernels.triton_batched.step

    @property
    def n_running(self) -> int:
        """Places that are taken by what goes on."""
        return len(self._reached)

    def fits(self, segment: Segment) -> bool:
        """Whether there is room for a segment's prompt."""
        pipeline = self.decoder.pipeline
        n_text = pipeline.text_tokens(segment.text, segment.language).shape[1]
        return self.decoder.opening() + n_text + pipeline.n_starts <= self._longest

    # -- who comes, and who goes -----------------------------------------------------------------------------------

    def admit(self, segments: Sequence[Segment], seeds: Sequence[int]) -> list[int]:
        """Read the segments' prompts, which have to fit, into free places, all at once; returns those places."""
        p, sampling, hp = self._places, self.decoder.pipeline.sampling, self.decoder.t3.hp
        hidden, _, lengths = self.decoder.prefill(list(segments), self._reader.prefill)
        taken = [self.free.pop() for _ in segments]
        slots = torch.tensor(taken, device=self._device)
        rows = torch.cat([side * self.n + slots for side in range(self._sides)])
        of_rows = torch.tensor(lengths * self._sides, device=self._device)
        self._engine.keep(rows, of_rows, self._reader)
        p.hidden[rows] = hidden.to(p.hidden.dtype)
        p.written[slots] = 0
        p.wanted[slots] = torch.tensor([s.n_tokens or sampling.max_new_tokens for s in segments], device=self._device)
        p.pinned[slots, 0] = torch.tensor([s.n_tokens is not None for s in segments], device=self._device)
        p.seeds[slots] = torch.tensor(list(seeds), device=self._device)
        p.seen[slots] = False
        p.seen[slots, hp.start_speech_token] = True
        p.running[slots] = True
        self._reached |= dict(zip(taken, lengths, strict=True))
        return taken

    def release(self, slot: int) -> None:
        """A place is free again, whether or not all was said in it."""
        self._places.running[slot] = False
        self._reached.pop(slot, None)
        self.free.append(slot)

    def go_on(self, n: int) -> dict[int, tuple[Tensor, bool]]:
        """Up to `n` more tokens in every place that goes on; of each, the ids so far [n] on the CPU, and whether that
        is all."""
        went_on = list(self._reached)
        for _ in range(n):
            # What the kernels read depends on the rows' positions alone; PyTorch's operators read up to an extent.
            reached = max(self._reached.values()) + 1
            extent = self._engine.capacity if self._device.type == "cuda" else min(reached, self._engine.capacity)
            self.graphs.run(STAGE, extent, partial(self._step, extent))
            self._reached = {slot: reached + 1 for slot, reached in self._reached.items()}
        self.n_steps += n
        p = self._places
        written, running = torch.stack((p.written, p.running.long())).tolist()
        tokens = p.tokens[:, : max(written)].cpu()
        for slot in went_on:
            if not running[slot]:
                self._reached.pop(slot)
        return {slot: (tokens[slot, : written[slot]], not running[slot]) for slot in went_on}

    # -- the step ----------------------------------------------------------------------------------------------------

    def _step(self, extent: int) -> None:
        """Choose a token in every place that goes on, and run it through the transformer."""
        p, t3, sides = self._places, self.decoder.t3, self._sides
        going, at = p.running, p.written.clamp_max(p.tokens.shape[1] - 1)
        logits = guide(self.decoder.logits(p.hidden), self._settings.cfg_weight, sides)
        logits = logits.masked_fill(p.pinned & self._beyond, HELD_BACK)
        times = times_of(p.seeds, p.written, logits.shape[1])
        token = sample_by(self._settings, logits, p.seen, self._filters, times)
        old = p.tokens.gather(1, at[:, None])
        p.tokens.scatter_(1, at[:, None], torch.where(going[:, None], token, old))
        p.seen.scatter_(1, token, p.seen.gather(1, token) | going[:, None])
        p.written += going
        embedding = t3.speech_emb(token)
        if (positions := self.decoder.speech_positions) is not None:
            embedding = embedding + positions[p.written.clamp_max(len(positions) - 1)][:, None]
        p.embeds.copy_(embedding.repeat(sides, 1, 1))
        p.hidden.copy_(self._step_of_engine(self._engine, p.embeds, extent))
        self._engine.position += going.repeat(sides)
        stopped = (token[:, 0] == t3.hp.stop_speech_token) & ~p.pinned[:, 0]
        p.running.copy_(going & ~stopped & (p.written < p.wanted))
