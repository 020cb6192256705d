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
from optimizations.common.padding import padded_length, power_of_two
from optimizations.t3.captured_loop import PROMPT_BUCKET
from optimizations.t3.decoder import Decoder
from optimizations.t3.engines import StaticEngine
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

    def read_into(self, embeds: Tensor, pads: Tensor, rows: Tensor) -> Tensor:
        """Prompts [R, n, C], padded on the left by `pads` [R], into `rows` [R] of the cache, without their padding.

        Returns the last hidden states [R, C]. Asks the device nothing, so that it can be captured.
        """
        n = embeds.shape[1]
        slots = torch.arange(n, device=embeds.device)
        places = tuple(table[(slots - pads[:, None]).clamp_min(0)] for table in self.tables)
        # A padded slot may look at itself, or its softmax would be over nothing.
        seen = (slots <= slots[:, None]) & (slots >= pads[:, None, None]) | (slots == slots[:, None])
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=embeds.device).masked_fill_(~seen, -torch.inf)
        source = (slots + pads[:, None]).clamp_max(n - 1)[:, None, :, None]

        def store(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            at = source.expand(-1, k.shape[1], -1, k.shape[3])
            self.keys[index][rows, :, :n] = k.gather(2, at)
            self.values[index][rows, :, :n] = v.gather(2, at)
            return k, v

        hidden = self._layers(embeds, places, store, mask[:, None], causal=False, newest=1, visible=None)
        self.position[rows] = n - pads
        return hidden


@dataclass
class Prompts:
    """Prompts on their way into their places: B of them, `longest` positions each, C wide."""

    embeds: Tensor  # [sides B, longest, C]: padded on the left
    pads: Tensor  # [sides B]
    rows: Tensor  # [sides B]: where they go

    def fill(self, embeds: Tensor, pads: Tensor, rows: Tensor, sides: int) -> None:
        """Up to B prompts [sides b, n, C]; what is left over repeats the last one."""
        each, n = len(self.embeds) // sides, embeds.shape[1]
        for mine, given in ((self.embeds[:, -n:], embeds), (self.rows, rows), (self.pads, pads)):
            by_side = given.unflatten(0, (sides, -1))
            spare = by_side[:, -1:].expand(-1, each - by_side.shape[1], *by_side.shape[2:])
            mine.copy_(torch.cat((by_side, spare), dim=1).flatten(0, 1))
        self.embeds[:, :-n] = 0
        self.pads += self.embeds.shape[1] - n


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
        self._opening = decoder.opening()
        limit = pipeline.sampling.max_new_tokens
        self._step_of_engine = self._kernels_or_layers()
        self._engine = SlotEngine(t3.tfmr, self._sides * n, longest + limit + 1)
        self._prompts: dict[tuple[int, int], Prompts] = {}
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
        n_text = pipeline.text_tokens(segment.text, segment.language, wait=False).shape[1]
        return self._opening + n_text + pipeline.n_starts <= self._longest

    # -- who comes, and who goes -----------------------------------------------------------------------------------

    def admit(self, segments: Sequence[Segment], seeds: Sequence[int]) -> list[int]:
        """Read the segments' prompts, which have to fit, into free places, all at once; returns those places."""
        p, sampling, hp = self._places, self.decoder.pipeline.sampling, self.decoder.t3.hp
        taken = [self.free.pop() for _ in segments]
        wanted = [segment.n_tokens or sampling.max_new_tokens for segment in segments]
        pinned = [segment.n_tokens is not None for segment in segments]
        # Nothing here waits for the device: meanwhile the host gets the next ones' prompts ready.
        numbers = torch.tensor([taken, wanted, pinned, list(seeds)], dtype=torch.long)
        slots, limits, pins, own = numbers.to(self._device, non_blocking=True)
        _, _, lengths = self.decoder.prefill(list(segments), partial(self._read, slots), reuse=False)
        p.written[slots] = 0
        p.wanted[slots] = limits
        p.pinned[slots, 0] = pins.bool()
        p.seeds[slots] = own
        p.seen[slots] = False
        p.seen[slots, hp.start_speech_token] = True
        p.running[slots] = True
        self._reached |= dict(zip(taken, lengths, strict=True))
        return taken

    def _read(self, slots: Tensor, embeds: Tensor, pad: Tensor | None, _prefix: None) -> Tensor:
        """Prompts [sides n, L, C], `pad` [sides n] slots of padding on the left, into places [n]; as a prefill."""
        n, length = len(slots), embeds.shape[1]
        shape = power_of_two(n), padded_length(length, PROMPT_BUCKET)
        if shape not in self._prompts:
            like, rows = embeds.new_zeros(self._sides * shape[0], shape[1], embeds.shape[2]), self._sides * shape[0]
            numbers = torch.zeros(2, rows, dtype=torch.long, device=self._device)
            self._prompts[shape] = Prompts(like, *numbers)
        prompts = self._prompts[shape]
        pads = torch.zeros(self._sides * n, dtype=torch.long, device=self._device) if pad is None else pad
        rows_of = torch.cat([side * self.n + slots for side in range(self._sides)])
        prompts.fill(embeds, pads, rows_of, self._sides)
        self.graphs.run(STAGE, ("prompt", *shape), partial(self._read_prompts, prompts))
        return self._places.hidden[rows_of]

    def _read_prompts(self, prompts: Prompts) -> None:
        hidden = self._engine.read_into(prompts.embeds, prompts.pads, prompts.rows)
        self._places.hidden[prompts.rows] = hidden.to(self._places.hidden.dtype)

    def prepare(self, most: int) -> None:
        """Read prompts of every length and number, up to `most` at a time, of nobody's, and take a step of nobody's."""
        width = self._places.embeds.shape[2]
        for exponent in reversed(range(min(most, self.n).bit_length())):
            slots = torch.arange(1 << exponent, device=self._device)
            for length in range(padded_length(self._longest, PROMPT_BUCKET), 0, -PROMPT_BUCKET):
                embeds = self._places.embeds.new_zeros(self._sides << exponent, length, width)
                self._read(slots, embeds, None, None)
        self._engine.position.zero_()
        extent = self._engine.capacity
        self.graphs.run(STAGE, extent, partial(self._step, extent))

    def release(self, slot: int) -> None:
        """A place is free again, whether or not all was said in it."""
        self._places.running[slot] = False
        self._engine.position[slot :: self.n] = 0  # what attention reads of a place that nobody has
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
