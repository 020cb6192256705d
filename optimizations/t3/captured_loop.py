"""The decode loop with everything that changes from token to token on the device.

The decoder's own loop hands numbers to the device for each token (the position, the temperature) and asks for one back
(is it over?). Here the step is a function of buffers that stay where they are, so it can be captured: it runs the
newest token through the transformer, samples, and writes the token, its embedding, the ids seen and the position down
for the next step. The host only says how far attention has to read, in whole buckets, and looks every few tokens
whether all rows are finished; as many steps are one graph, for between two graphs a GPU waits some microseconds. What
runs beyond the end is cut off, so the tokens are those of the decoder's own loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE
from torch import Tensor

from harness.measure import synchronize
from harness.pipeline import HELD_BACK
from optimizations.common.graphs import DelayedFlag, Draws, Graphs
from optimizations.common.kernels import for_device
from optimizations.common.memory import Reused
from optimizations.common.padding import padded_length, power_of_two
from optimizations.t3.decoder import Decoder
from optimizations.t3.engines import Prefix, StaticEngine
from optimizations.t3.sampling import Filters, SamplingTensors, guide, sample_by
from optimizations.t3.token_buffers import TokenBuffers

STAGE = "generate_tokens"
PROMPT_BUCKET = 32
"""Positions to which prompts are padded; at full size reading 32 more takes no longer."""


class CapturedLoop:
    """Decodes for a `Decoder` whose engine is static, in steps that `graphs` runs.

    On a GPU what follows the logits is one Triton kernel.

    Batches are filled up to a power of two with rows that nobody wants, so that few numbers of rows occur; a step's
    time hardly depends on it. `poll` is the number of steps in a graph, and between two looks at whether all is said.
    """

    def __init__(self, decoder: Decoder, graphs: Graphs, poll: int) -> None:
        self.decoder, self.graphs, self.poll = decoder, graphs, poll
        self.device = decoder.pipeline.device
        self._settings = SamplingTensors(self.device)
        self._finished = DelayedFlag(self.device)
        self._token_buffers: dict[tuple[int, int], TokenBuffers] = {}
        self._prompts: dict[tuple[int, int], Tensor] = {}
        self._prompts_memory = Reused(self.device)
        self._embeds: dict[int, Tensor] = {}
        self._moves = -1
        self._kernels = for_device("optimizations.t3.triton_sampling", self.device)

    @property
    def engine(self) -> StaticEngine:
        engine = self.decoder.engine
        assert isinstance(engine, StaticEngine)
        return engine

    @staticmethod
    def n_rows(n: int) -> int:
        """Rows to decode with for `n` that are wanted."""
        return power_of_two(n)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Prefix | None) -> Tensor:
        """`Engine.prefill` on prompts [R, n, C] that are padded on the left to whole buckets."""
        rows, n, width = embeds.shape
        longest = padded_length(n, PROMPT_BUCKET)
        prompt = self._prompt(rows, longest, width)
        prompt[:, : longest - n] = 0
        prompt[:, longest - n :] = embeds
        pads = torch.zeros(rows, dtype=torch.long, device=embeds.device) if pad is None else pad
        self.engine.begin(prompt, pads + (longest - n), prefix)
        self._follow_moves()
        start = self.engine.length
        shape = ("prompt", rows, longest, start)
        hidden = self.graphs.run(STAGE, shape, lambda: self.engine.read(prompt, start)).clone()
        self.engine.length = start + longest
        return hidden

    def _prompt(self, rows: int, longest: int, width: int) -> Tensor:
        """The buffer for such prompts [R, n, C], which come one at a time."""
        key = rows, longest
        if key not in self._prompts:
            self._prompts[key] = self._prompts_memory.take((rows, longest, width), self.engine.dtype)
        return self._prompts[key]

    @torch.inference_mode()
    def decode(self, hidden: Tensor, n: int, limit: int, pinned: bool) -> Tensor:
        """Tokens [n, limit] from the prompts' last hidden states [sides of rows, C].

        Behind a row's end they mean nothing.
        """
        draws, filled = Draws(self.device), self.engine.length
        buffers, made = self._start(hidden, n, limit, pinned), 1
        while made < limit:
            # What is no whole graph comes first: meanwhile the host launches the large one.
            at_once = 1 if (limit - made) % self.poll else self.poll
            self._advance(buffers, filled + made - 1, at_once)
            made += at_once
            if made < limit and at_once == self.poll and not pinned and self._finished.look(buffers.finished.all()):
                break
        tokens = buffers.tokens[:n, :made]
        if self.decoder.pipeline.sampling.greedy:
            draws.keep(0, made)
        elif not pinned:
            draws.keep(self._length(tokens), made)
        return tokens

    @torch.inference_mode()
    def steps(self, hidden: Tensor, n: int, limit: int, pinned: bool) -> Iterator[Tensor]:
        """The tokens of `decode` so far, [n, made], each time that one more was launched, up to the limit."""
        filled = self.engine.length
        buffers = self._start(hidden, n, limit, pinned)
        yield buffers.tokens[:n, :1]
        for made in range(1, limit):
            self._advance(buffers, filled + made - 1)
            yield buffers.tokens[:n, : made + 1]

    def _start(self, hidden: Tensor, n: int, limit: int, pinned: bool) -> TokenBuffers:
        """The first token for every row, from the prompts' last hidden states."""
        buffers = self._begin(hidden.shape[0] // self.decoder.sides, n, limit, pinned)
        self._choose_first(buffers, hidden)
        if not self.decoder.pipeline.start_stays_seen:
            start = self.decoder.t3.hp.start_speech_token
            buffers.seen[:, start] = buffers.token[:, 0] == start
        return buffers

    @torch.inference_mode()
    def follow(self, hidden: Tensor, n: int, tokens: Tensor) -> Iterator[Tensor]:
        """Guided logits [n, V] before each of the tokens [n, limit]; the steps are those of `decode`, as captured.

        What a step has chosen is overwritten before the next one reads it.
        """
        rows, limit = hidden.shape[0] // self.decoder.sides, tokens.shape[1]
        buffers = self._begin(rows, n, limit, pinned=True)
        wanted = torch.cat((tokens, tokens[-1:].expand(rows - n, -1)))
        filled = self.engine.length
        logits = self._choose_first(buffers, hidden)
        for step in range(limit):
            if step:
                buffers.embeds.copy_(self.decoder.token_embedding(wanted[:, step - 1 : step], step))
                logits = self._advance(buffers, filled + step - 1)
            yield guide(logits, self.decoder.pipeline.sampling.cfg_weight, self.decoder.sides)[:n]

    @torch.inference_mode()
    def step(self, embeds: Tensor) -> Tensor:
        """`Engine.step`, for a loop that has to see every token: good until the next step."""
        engine, position = self.engine, self.engine.length
        extent = self._extent(position)
        if len(embeds) not in self._embeds:
            self._embeds[len(embeds)] = embeds.new_zeros(embeds.shape)
        newest = self._embeds[len(embeds)]
        newest.copy_(embeds)

        def body() -> tuple[Tensor, list[Tensor]]:
            hidden = engine.static_step(newest, extent)
            engine.position += 1
            return hidden, engine.rows

        hidden, engine.rows = self.graphs.run(STAGE, ("step", len(embeds), engine.sides, extent), body)
        engine.length = position + 1
        return hidden

    def prepare(self, positions: Mapping[int, int], prompt: int) -> None:
        """Capture what batches of these sizes take: steps up to so many positions, prompts of up to `prompt` of them.

        What is largest is captured first: what the others need then fits into its memory.
        """
        decoder, engine = self.decoder, self.engine
        engine.heads, engine.sides = decoder.watched_heads, decoder.sides
        sizes = positions if decoder.guarded else {self.n_rows(n): length for n, length in positions.items()}
        batches = sorted(sizes.items(), reverse=True)
        for n, length in reversed(batches):  # so that the largest memory is made once
            engine.reserve(decoder.sides * n, length)
        for n, length in batches:
            if not decoder.guarded:
                self._prepare_prompts(n, prompt)
            self._prepare_steps(n, length, decoder.guarded)

    def _prepare_prompts(self, n: int, longest: int) -> None:
        decoder, width = self.decoder, self.decoder.t3.speech_emb.weight.shape[1]
        voice = next(iter(decoder.pipeline.voices.values()))
        prefix = decoder.stacked_prefixes([voice.t3]) if decoder.reuse_prefix else None
        for length in range(longest, 0, -PROMPT_BUCKET):
            self.prefill(torch.zeros(decoder.sides * n, length, width, device=self.device), None, prefix)

    def _prepare_steps(self, n: int, positions: int, guarded: bool) -> None:
        engine = self.engine
        engine.reserve(self.decoder.sides * n, positions)
        buffers = self._begin(n, n, limit=1, pinned=True)
        for last in range(engine.capacity - 1, 0, -engine.bucket):
            if guarded:
                engine.length = last
                engine.position.fill_(last)
                self.step(buffers.embeds)
                continue
            for at_once in {1, self.poll}:
                buffers.written.zero_()
                first = max(0, last + 1 - at_once)
                engine.position.fill_(first)
                self._advance(buffers, first, at_once)

    def _begin(self, rows: int, n: int, limit: int, pinned: bool) -> TokenBuffers:
        """Buffers for `rows` rows, of which the first `n` are wanted, as it is before the first token."""
        decoder, hp = self.decoder, self.decoder.t3.hp
        key = decoder.sides, rows
        buffers = self._token_buffers.get(key)
        if buffers is None or buffers.tokens.shape[1] < limit:
            if buffers is not None:
                self._start_again()
            longest = max(limit, decoder.pipeline.sampling.max_new_tokens, self.poll)
            n_ids = decoder.t3.speech_head.out_features
            blank = TokenBuffers.blank(rows, decoder.sides, longest, decoder.t3.speech_emb.weight, n_ids)
            buffers = self._token_buffers[key] = blank
        self._settings.set(decoder.pipeline.sampling)
        self._finished.reset()
        buffers.tokens.fill_(hp.stop_speech_token)
        buffers.written.zero_()
        buffers.seen.zero_()
        buffers.seen[:, hp.start_speech_token] = True
        buffers.held[SPEECH_VOCAB_SIZE:] = pinned
        buffers.finished.zero_()
        buffers.finished[n:] = True
        if pinned:  # all that there will be, at once
            self.engine.extend(self.engine.length, self.engine.length + limit - 1)
        return buffers

    def _advance(self, buffers: TokenBuffers, position: int, at_once: int = 1) -> Tensor:
        """That many more tokens for every row, and the logits [sides of rows, V] that the last was chosen by.

        They are good until the next one. `position` is the slot that the newest token takes.
        """
        extent = self._extent(position, at_once)
        shape = (len(buffers.token), self.decoder.sides, extent, self._filters, at_once)
        return self.graphs.run(STAGE, shape, lambda: self._steps(buffers, extent, at_once))

    def _extent(self, position: int, n: int = 1) -> int:
        """The slots that `n` steps from `position` on read, in whole buckets; makes room where there is none.

        For a quarter more than there was, as what has been captured is captured again.
        """
        engine, last = self.engine, position + n - 1
        if last >= engine.capacity:
            engine.extend(position, last + 1 + engine.capacity // 4)
        self._follow_moves()
        return min((last // engine.bucket + 1) * engine.bucket, engine.capacity)

    def _follow_moves(self) -> None:
        if self.engine.moves != self._moves:
            self._start_again()
            self._moves = self.engine.moves

    def _start_again(self) -> None:
        """Drop the graphs, whose buffers have moved, when the last of them has run."""
        synchronize(self.device)
        self.graphs.forget(STAGE)

    def _steps(self, buffers: TokenBuffers, extent: int, n: int) -> Tensor:
        """The newest tokens through the transformer, and the next ones; `n` times."""
        self.engine.ended = buffers.finished
        # All draws first: between two steps they would keep kernels from starting early.
        for times in [self._times(buffers) for _ in range(n)]:
            logits = self._choose(buffers, self.engine.static_step(buffers.embeds, extent), times)
        self.engine.ended = None
        return logits

    def _choose_first(self, buffers: TokenBuffers, hidden: Tensor) -> Tensor:
        """`_choose` from the prompts' last hidden states."""
        # Times come first: the kernel reads them before it waits, so something must have waited for them before.
        times = self._times(buffers)
        self.engine.position -= 1  # the prompt's last slot: every choice moves it on
        return self._choose(buffers, hidden, times)

    @property
    def _filters(self) -> Filters:
        return Filters.of(self.decoder.pipeline.sampling)

    def _times(self, buffers: TokenBuffers) -> Tensor | None:
        """The next draw's random numbers [B, V] for the kernel; what works without it draws them itself."""
        if self._kernels is None:
            return None
        return torch.empty_like(buffers.seen, dtype=torch.float32).exponential_()

    def _choose(self, buffers: TokenBuffers, hidden: Tensor, times: Tensor | None) -> Tensor:
        """Sample a token for every row and write it down, with its embedding and its slot; returns the logits."""
        t3, logits, position = self.decoder.t3, self.decoder.logits(hidden), self.engine.position
        table, positions, stop = t3.speech_emb.weight, self.decoder.speech_positions, t3.hp.stop_speech_token
        if times is not None:
            self._kernels.choose_tokens(
                *(logits, times, self._settings, buffers, position, table, positions, stop, self._filters)
            )
            return logits
        guided = guide(logits, self._settings.cfg_weight, self.decoder.sides).masked_fill(buffers.held, HELD_BACK)
        buffers.token.copy_(sample_by(self._settings, guided, buffers.seen, self._filters))
        buffers.tokens.index_copy_(1, buffers.written, buffers.token)
        buffers.seen.scatter_(1, buffers.token, True)
        buffers.finished |= buffers.token == stop
        buffers.written += 1
        position += 1
        embedding = t3.speech_emb(buffers.token)
        if positions is not None:
            embedding = embedding + positions.index_select(0, buffers.written)
        buffers.embeds.copy_(embedding.repeat(self.decoder.sides, 1, 1))
        return logits

    def _length(self, tokens: Tensor) -> int:
        """Steps until the last row of `tokens` [n, made] stopped, the stop itself included."""
        stopped = (tokens == self.decoder.t3.hp.stop_speech_token).long()
        first = torch.where(stopped.any(dim=1), stopped.argmax(dim=1) + 1, tokens.shape[1])
        return int(first.max())
