"""One decode loop for every optimization of T3.

Plugins do not each bring a loop of their own: the first one that needs it puts a `Decoder` in the place of the
`generate_tokens` stage (`decoder_of`), and each sets what it is about: the engine (dynamic or static cache), the
number of segments decoded together, the reuse of a voice's prefix. So any two of them compose.

`cuda_graphs` also puts a loop of its own (`captured_loop.py`) in the place of the one below; everything around it
stays.

The loop keeps upstream's semantics: two start tokens, guidance, penalties and sampling in the same order with the
same random numbers; the model's backend is built once instead of once per call. On a multilingual model the alignment
guard comes along, in its lean form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE
from chatterbox.models.t3.inference import alignment_stream_analyzer
from chatterbox.models.t3.modules.cond_enc import T3Cond
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function

from harness.pipeline import HELD_BACK, Pipeline, Segment
from harness.sampling import Sampling
from optimizations.t3.engines import Engine, GrowingEngine, Heads, Prefix, StaticEngine
from optimizations.t3.guard import Guard
from optimizations.t3.sampling import guide, sample


def decoder_of(pipeline: Pipeline, by: str) -> Decoder:
    """The pipeline's decoder; puts one in the place of `generate_tokens` where there is none yet."""
    stage = pipeline.stages["generate_tokens"]
    if not isinstance(stage, Decoder):
        stage = Decoder(pipeline)
        pipeline.replace_stage("generate_tokens", stage, by="decoder")
    if by not in stage.users:
        stage.users.append(by)
        pipeline.on_undo(lambda: stage.users.remove(by))
    return stage


Observer = Callable[[Sequence[Segment], list[int], list[Tensor]], None]
"""Called after each decode with the segments, their prompts' lengths and their tokens."""
MAX_PREFIXES = 8
"""Voices whose prefix is kept; at full size one takes about 8 MB in float32."""
JUDGING = "multilingual guard"
"""What a profiler calls the guard's part of a token."""


class Loop(Protocol):
    """A loop that takes the place of the decoder's own: `captured_loop.CapturedLoop`."""

    def n_rows(self, n: int) -> int:
        """Rows to decode with for `n` that are wanted."""
        ...

    def prefill(self, embeds: Tensor, pad: Tensor | None, prefix: Prefix | None) -> Tensor:
        """`Engine.prefill`."""
        ...

    def decode(self, hidden: Tensor, n: int, limit: int, pinned: bool) -> Tensor:
        """Tokens [n, up to limit] from the prompts' last hidden states [sides of rows, C]."""
        ...

    def steps(self, hidden: Tensor, n: int, limit: int, pinned: bool) -> Iterator[Tensor]:
        """`decode`, with the tokens so far [n, made] after each one, up to the limit."""
        ...

    def step(self, embeds: Tensor) -> Tensor:
        """`Engine.step`, for the decoder's own loop."""
        ...

    def follow(self, hidden: Tensor, n: int, tokens: Tensor) -> Iterator[Tensor]:
        """Guided logits [n, V] before each of the tokens [n, limit], which are said whatever is likely."""
        ...


class Decoder:
    """Segments -> speech tokens [n] each; a stage of the pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.t3 = pipeline.model.t3
        self.engine: Engine = GrowingEngine(self.t3.tfmr)
        self.sample: Callable[[Tensor, Tensor, Sampling], Tensor] = sample
        self.batch_size = 1
        self.reuse_prefix = False
        self.captured_loop: Loop | None = None
        self.guarded: bool = self.t3.hp.is_multilingual
        self.users: list[str] = []
        self.observers: list[Observer] = []
        self.batches: list[int] = []
        self.decisions: Counter[str] = Counter()
        self.logits_dtype: torch.dtype | None = None
        self.n_calls = 0
        self.n_prefix_hits = 0
        self._prefixes: dict[int, tuple[T3Cond, Prefix]] = {}

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Decode the segments in batches, the longest texts together; results come in the segments' order."""
        self.n_calls += 1
        order = sorted(range(len(segments)), key=lambda i: -len(segments[i].text))
        tokens: dict[int, Tensor] = {}
        prompts: dict[int, int] = {}
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            self.batches.append(len(batch))
            decoded, lengths = self._decode([segments[i] for i in batch])
            tokens.update(zip(batch, decoded, strict=True))
            prompts.update(zip(batch, lengths, strict=True))
        spoken = [tokens[i] for i in range(len(segments))]
        for observe in self.observers:
            observe(segments, [prompts[i] for i in range(len(segments))], spoken)
        return spoken

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Decode without leaving a trace in the counters: for probes, which are no part of the run."""
        kept = self.n_calls, self.n_prefix_hits, list(self.batches), Counter(self.decisions), self.observers
        self.observers = []
        try:
            yield
        finally:
            self.n_calls, self.n_prefix_hits, self.batches, self.decisions, self.observers = kept

    @property
    def sides(self) -> int:
        """Rows that a segment takes: one, and with guidance another one without the text."""
        return 2 if self.pipeline.sampling.guided else 1

    @property
    def speech_positions(self) -> Tensor | None:
        """What a token's place in the speech adds to its embedding [positions, C]; None where the transformer knows."""
        table = self.t3.speech_pos_emb
        return None if table is None else table.emb.weight

    def opening(self) -> int:
        """Positions that a voice opens a prompt with."""
        voice = next(iter(self.pipeline.voices.values()))
        return self.t3.prepare_conditioning(voice.t3).shape[1]

    @property
    def watched_heads(self) -> Heads:
        """The attention heads that the guard looks at."""
        return tuple(alignment_stream_analyzer.LLAMA_ALIGNED_HEADS) if self.guarded else ()

    def forget_prefixes(self) -> None:
        """Drop cached voice prefixes, as is due when weights or dtypes changed."""
        self._prefixes.clear()

    def _decode(self, segments: list[Segment]) -> tuple[list[Tensor], list[int]]:
        """One batch, row i of every tensor being segment i; returns tokens and prompt lengths."""
        n = len(segments)
        pins = [segment.n_tokens for segment in segments]
        if None in pins and any(pins):
            raise ValueError("a batch mixes pinned and free-running segments")
        pinned, limit = None not in pins, max(pin or self.pipeline.sampling.max_new_tokens for pin in pins)

        # A guard judges each token on the host, so its loop stays; the engine's step in it may be a captured one.
        loop = None if self.guarded else self.captured_loop
        spare = [segments[-1]] * (loop.n_rows(n) - n if loop else 0)
        hidden, guards, lengths = self.prefill(segments + spare, loop.prefill if loop else self.engine.prefill)
        if any(segment.teacher for segment in segments):
            tokens = self._follow(hidden, segments, limit, loop)
        else:
            tokens = loop.decode(hidden, n, limit, pinned) if loop else self._loop(hidden, guards, limit, pinned)
        return [self._trim(row, pin) for row, pin in zip(tokens, pins, strict=True)], lengths[:n]

    def stream(self, segment: Segment) -> Iterator[Tensor]:
        """Decode a segment token by token: after each one, the ids so far [n], which a GPU may still be at work on.

        A captured loop goes on behind the stop token: `spoken` tells. Nothing else may be decoded before this is over.
        """
        self.n_calls += 1
        self.batches.append(1)
        pinned, limit = segment.n_tokens is not None, segment.n_tokens or self.pipeline.sampling.max_new_tokens
        loop = None if self.guarded else self.captured_loop
        hidden, guards, _ = self.prefill([segment], loop.prefill if loop else self.engine.prefill)
        steps = loop.steps(hidden, 1, limit, pinned) if loop else self._steps(hidden, guards, limit, pinned)
        for tokens in steps:
            yield tokens[0]

    def spoken(self, tokens: Tensor, pinned: bool) -> tuple[Tensor, bool]:
        """The speech in ids so far [n], and whether the stop token was among them."""
        stopped = not pinned and bool((tokens == self.t3.hp.stop_speech_token).any())
        return self._trim(tokens, len(tokens) if pinned else None), stopped

    def _loop(self, hidden: Tensor, guards: list[tuple[Guard, slice]], limit: int, pinned: bool) -> Tensor:
        """Token by token, from the prompts' last hidden states [sides of n, C] to ids [n, up to limit]."""
        *_, tokens = self._steps(hidden, guards, limit, pinned)
        return tokens

    def _steps(self, hidden: Tensor, guards: list[tuple[Guard, slice]], limit: int, pinned: bool) -> Iterator[Tensor]:
        """After each token the ids so far [n, made], until all rows have stopped."""
        sampling, hp, device = self.pipeline.sampling, self.t3.hp, hidden.device
        n = hidden.shape[0] // self.sides
        token = torch.full((n, 1), hp.start_speech_token, dtype=torch.long, device=device)
        tokens = torch.full((n, limit), hp.stop_speech_token, dtype=torch.long, device=device)
        seen = torch.zeros(n, self.t3.speech_head.out_features, dtype=torch.bool, device=device)
        seen[:, hp.start_speech_token] = True
        finished = torch.zeros(n, 1, dtype=torch.bool, device=device)
        advance = self.captured_loop.step if self.captured_loop else self.engine.step
        for step in range(limit):
            logits = guide(self.logits(hidden), sampling.cfg_weight, self.sides)
            if guards:
                judged = self._judge(guards, logits, token)
                logits = logits if pinned else judged
            if pinned:
                logits[:, SPEECH_VOCAB_SIZE:] = HELD_BACK
            token = self.sample(logits, seen, sampling)
            tokens[:, step : step + 1] = token
            if not self.pipeline.start_stays_seen:
                seen[:, hp.start_speech_token] = False
            seen.scatter_(1, token, True)
            finished |= token == hp.stop_speech_token
            yield tokens[:, : step + 1]
            if step + 1 == limit or (not pinned and finished.all()):
                return
            hidden = advance(self.token_embedding(token, step + 1))

    def _follow(self, hidden: Tensor, segments: list[Segment], limit: int, loop: Loop | None) -> Tensor:
        """Tokens [n, limit] as the segments' teachers want them; the teachers hear the logits of each step."""
        teachers = [segment.teacher for segment in segments if segment.teacher]
        if len(teachers) < len(segments):
            raise ValueError("a batch mixes segments with and without a teacher")
        tokens = pad_sequence([t.tokens.to(hidden.device) for t in teachers], batch_first=True)[:, :limit]
        following = loop.follow(hidden, len(teachers), tokens) if loop else self._step_along(hidden, tokens)
        for logits in following:
            for row, teacher in zip(logits, teachers, strict=True):
                teacher.listen(row)
        return tokens

    def _step_along(self, hidden: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        """`Loop.follow`, in the decoder's own loop."""
        advance = self.captured_loop.step if self.captured_loop else self.engine.step
        for step in range(tokens.shape[1]):
            if step:
                hidden = advance(self.token_embedding(tokens[:, step - 1 : step], step))
            yield guide(self.logits(hidden), self.pipeline.sampling.cfg_weight, self.sides)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head in its own precision, what follows in float32: sampling is sensitive to rounding."""
        head = self.t3.speech_head
        logits = head(hidden.to(head.weight.dtype)).float()
        self.logits_dtype = logits.dtype
        return logits

    def token_embedding(self, token: Tensor, position: int) -> Tensor:
        """Embeddings [sides of n, 1, C] of the tokens [n, 1]."""
        embedding = self.t3.speech_emb(token)
        if self.speech_positions is not None:
            embedding = embedding + self.speech_positions[position]
        return embedding.expand(self.sides, *embedding.shape).flatten(0, 1)

    def _trim(self, tokens: Tensor, pin: int | None) -> Tensor:
        if pin is None:
            stops = (tokens == self.t3.hp.stop_speech_token).nonzero()
            pin = int(stops[0]) if len(stops) else len(tokens)
        return self.pipeline.speech_only(tokens[:pin])

    # -- the prompt ----------------------------------------------------------------------------------------------

    def prefill(
        self, segments: list[Segment], read: Callable[..., Tensor], reuse: bool = True
    ) -> tuple[Tensor, list[tuple[Guard, slice]], list[int]]:
        """Run the prompts, with the engine's own `prefill` or another one like it; `reuse` kept voices' prefixes.

        Returns the last hidden state [sides of n, C], each row's guard with its text's slots, and the prompts' lengths.
        """
        texts, sides = [self._text_embeddings(segment) for segment in segments], self.sides
        n_texts = [text.shape[1] - self.pipeline.n_starts for text in texts]
        prefix = None
        if reuse and self.reuse_prefix and isinstance(self.engine, StaticEngine):
            prefix = self.stacked_prefixes([segment.conditionals.t3 for segment in segments])
            starts, prompts = prefix[0][0].shape[2], texts
        else:
            own = {id(segment.conditionals.t3): segment.conditionals.t3 for segment in segments}
            opened = {key: self.t3.prepare_conditioning(voice) for key, voice in own.items()}
            voices = [opened[id(segment.conditionals.t3)] for segment in segments]
            prompts = [torch.cat((v.expand(sides, -1, -1), t), dim=1) for v, t in zip(voices, texts, strict=True)]
            starts = voices[0].shape[1]
        longest = max(prompt.shape[1] for prompt in prompts)
        pads = [longest - prompt.shape[1] for prompt in prompts]
        padded = [F.pad(prompt, (0, 0, pad, 0)) for prompt, pad in zip(prompts, pads, strict=True)]
        embeds = torch.stack(padded, dim=1).flatten(0, 1)
        pad = torch.tensor(pads * sides).to(embeds.device, non_blocking=True) if any(pads) else None

        guards = []
        self.engine.heads, self.engine.sides = self.watched_heads, sides
        if self.guarded:
            stop = self.t3.hp.stop_speech_token
            guards = [
                (Guard(length, stop), slice(starts + offset, starts + offset + length))
                for length, offset in zip(n_texts, pads, strict=True)
            ]
        return read(embeds, pad, prefix), guards, [starts + text.shape[1] for text in texts]

    def _text_embeddings(self, segment: Segment) -> Tensor:
        """[sides, n + starts, C]: the text, blank on the unconditional side, and upstream's start tokens."""
        t3, tokens = self.t3, self.pipeline.text_tokens(segment.text, segment.language, wait=False)
        tokens = tokens.long()[: self.sides]
        embedding = t3.text_emb(tokens)
        embedding[1:].zero_()
        starts = torch.full((self.sides, self.pipeline.n_starts), t3.hp.start_speech_token, device=tokens.device)
        begin = t3.speech_emb(starts)
        if t3.text_pos_emb is not None:
            embedding = embedding + t3.text_pos_emb(tokens)
            begin = begin + t3.speech_pos_emb.emb.weight[0]
        return torch.cat((embedding, begin), dim=1)

    def stacked_prefixes(self, voices: Sequence[T3Cond]) -> Prefix:
        """Keys and values that the voices open with, [1, ...] where it is the same one, else a row each."""
        prefixes = [self._prefix(voice) for voice in voices]
        if all(prefix is prefixes[0] for prefix in prefixes):
            return prefixes[0]
        layers = zip(*prefixes, strict=True)
        return [
            (torch.cat([k for k, _ in row] * self.sides), torch.cat([v for _, v in row] * self.sides)) for row in layers
        ]

    def _prefix(self, conditionals: T3Cond) -> Prefix:
        """Text comes after the voice and attention is causal: a voice's keys and values are the same for any text."""
        assert isinstance(self.engine, StaticEngine)
        known = self._prefixes.get(id(conditionals))
        if known is not None:
            self.n_prefix_hits += 1
            return known[1]
        if len(self._prefixes) >= MAX_PREFIXES:
            self._prefixes.pop(next(iter(self._prefixes)))
        prefix = self.engine.prefix(self.t3.prepare_conditioning(conditionals))
        # The conditionals are kept with it, so that no other object can take over their id.
        self._prefixes[id(conditionals)] = (conditionals, prefix)
        return prefix

    def _judge(self, guards: list[tuple[Guard, slice]], logits: Tensor, token: Tensor) -> Tensor:
        """Every row's logits after its guard's decision; one copy to the host for all rows and heads."""
        with record_function(JUDGING):
            rows = torch.stack(self.engine.rows).cpu()
            last = token[:, 0].tolist()
            judged = [
                guard.judge(rows[:, i, :, text], logits[i : i + 1].clone(), last[i])
                for i, (guard, text) in enumerate(guards)
            ]
            self.decisions.update(guard.decision for guard, _ in guards)
            return torch.cat(judged)
