"""The first words while the rest is still being made."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.pipeline import Chunk, Chunks, Pipeline, Request, Segment, SynthesisError, Utterance, seed_draws
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.common.graphs import Capturer
from optimizations.flow.prefix import LOOKAHEAD
from optimizations.streams.pieces import Piece, SpokenPieces, own_random_numbers
from optimizations.t3.captured_loop import STAGE, CapturedLoop
from optimizations.t3.decoder import Decoder, decoder_of

PROBE_TEXT, PROBE_TOKENS = "This is said in pieces.", 40


@register
class Streaming(Optimization):
    """`synthesize_stream` in pieces of finished, watermarked wave.

    Baseline: the whole utterance goes through each stage, so its first word is heard when its last one is done.
    This: after `first` tokens, and the three more that the flow's encoder looks ahead, and then after `growth` times as
    many, up to `longest`, the flow makes a mel of the voice's prompt and all tokens so far, of which the new part goes
    through vocoder and watermark and out. On a GPU T3 goes on meanwhile, on a stream of its own.
    - T3 is not changed: it is the same loop, and draws the same random numbers, so the tokens are those of the whole
      utterance. Where no other optimization has brought a loop that can be stopped, the decoder's own is put in place.
    - Flow: a prefix has not seen what comes after it, so its mel is not the whole utterance's; every frame starts from
      the same noise in every pass, which keeps them close (`flow/prefix.py`). `context` bounds the tokens that a pass
      sees again. The first pass, for which somebody waits, takes `first_steps` Euler steps, the others all of them.
    - Vocoder: exact, given 16 mel frames on both sides; behind a piece there are the six of the lookahead. The source
      goes on, in phase (`vocoder/continued.py`).
    - Watermark: Perth's network looks 180 ms to either side. A window has that in front and 120 ms behind.
    - Joins: each window runs on over the lookahead's frames, and the next one fades in over the first two of those.
    Where not: whole utterances take the way they take without this. Streaming does the flow's work several times, so
    the last word comes later: on a GPU, too, where a pass beside T3 keeps it waiting. So pieces grow quickly; whoever
    is a second ahead of the player gains nothing by being there early. Segments of a text that `token_sequence` splits
    follow one another without a cross-fade.
    The campaign had nothing of the kind.
    Evidence: utterances streamed and pieces by number; in a probe, tokens before the first piece, and what Perth's
    detector answers on the joined whole.
    """

    name = "streaming"
    extra = True
    lossless = False

    @dataclass
    class Config:
        """`first`: tokens of the first piece, 25 a second; `first_steps`: of the flow for it. `growth`, `longest`: of
        the following pieces. `context`: tokens spoken already that the flow sees again."""

        first: int = number(16, least=1)
        first_steps: int = number(5, least=1, most=10)
        growth: float = number(4.0, least=1)
        longest: int = number(200, least=1)
        context: int = number(250, least=0)

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if pipeline.silence:
            return "streaming does not say the silence that this model's flow is given behind each segment"
        if other := pipeline.replaced_by.get("mel_to_wave"):
            return f"streaming goes on with HiFT's source, and {other} has taken HiFT's place: switch one of them off"
        if pipeline.model.s3gen.meanflow:
            return "streaming does not know the two steps of a Turbo checkpoint's flow yet: use one of the others"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        decoder = decoder_of(pipeline, self.name)
        self._streams = Streams(pipeline, decoder, self.config)
        pipeline.swap(pipeline, "streamer", self._streams)
        if pipeline.device.type == "cuda" and isinstance(decoder.captured_loop, CapturedLoop):
            decoder.captured_loop.graphs.keep_apart(STAGE, Capturer(pipeline.device))

    def evidence(self, pipeline: Pipeline) -> Evidence:
        pieces = list(self._streams.pieces)
        with self._streams.decoder.unrecorded():
            chunks, wave = collect(pipeline, Request(PROBE_TEXT, next(iter(pipeline.voices)), 0, PROBE_TOKENS))
        self._streams.pieces = pieces
        facts: dict[str, Any] = {
            "streams_count": len(pieces),
            "pieces_count": sum(pieces),
            "probe_pieces_s": [round(chunk.audio_s, 3) for chunk in chunks],
            "detector_on_joined": float(
                pipeline.model.watermarker.get_watermark(wave, sample_rate=pipeline.model.sr, round=False)
            ),
        }
        if not pieces:
            return Evidence(False, facts, "nobody asked for a stream: try workload.scenario=streaming")
        if len(chunks) < 2:
            return Evidence(False, facts, "the probe came in one piece")
        if round(facts["detector_on_joined"]) != 1:
            return Evidence(False, facts, "Perth's detector does not find the mark")
        return Evidence(True, facts)


def collect(pipeline: Pipeline, request: Request) -> tuple[list[Chunk], Piece]:
    """All chunks of a stream, and their waves put together."""
    chunks = list(pipeline.synthesize_stream(request.text, request.voice, request.seed, request.n_tokens))
    return chunks, np.concatenate([chunk.wave for chunk in chunks])


class Streams:
    """Speaks requests in pieces; the pipeline's `streamer`."""

    def __init__(self, pipeline: Pipeline, decoder: Decoder, config: Streaming.Config) -> None:
        self.pipeline, self.decoder, self.config = pipeline, decoder, config
        self.pieces: list[int] = []
        """Pieces of each utterance."""
        self._on_gpu = pipeline.device.type == "cuda"
        self._ahead = torch.cuda.Stream(pipeline.device) if self._on_gpu else None

    def __call__(self, request: Request) -> Chunks:
        start = time.perf_counter()
        if request.seed is not None:
            seed_draws(request.seed, self.pipeline.device)
        pipeline, waves, tokens = self.pipeline, [], []
        with pipeline.as_in_a_synthesis():
            segments = pipeline.segments(request)
        try:
            for segment in segments:
                spoken = self._speak(segment)
                while True:
                    # The contexts are for the work, and not for whoever asks for the next piece.
                    with pipeline.as_in_a_synthesis(), torch.inference_mode():
                        try:
                            wave = next(spoken)
                        except StopIteration as end:
                            tokens.append(end.value)
                            break
                    waves.append(wave)
                    yield Chunk(wave, pipeline.model.sr, time.perf_counter() - start)
        finally:
            if self._ahead is not None:  # whoever left before the end leaves T3 at work on buffers that others will use
                torch.cuda.current_stream(pipeline.device).wait_stream(self._ahead)
        self.pieces.append(len(waves))
        return Utterance(
            wave=np.concatenate(waves),
            sample_rate=pipeline.model.sr,
            tokens=tokens,
            segments=[segment.text for segment in segments],
            stages_s={},
            generation_time_s=time.perf_counter() - start,
            token_cap=pipeline.sampling.max_new_tokens,
        )

    def rehearse(self, request: Request) -> None:
        """Speak to nobody."""
        pieces = list(self.pieces)
        with self.decoder.unrecorded():
            collect(self.pipeline, request)
        self.pieces = pieces

    def _speak(self, segment: Segment) -> Generator[Piece, None, Tensor]:
        """A segment's pieces; its tokens [n] on the CPU in the end."""
        config, pipeline = self.config, self.pipeline
        tokens = TokenStream(self.decoder, segment, self._ahead)
        said, hop = 0, config.first
        tokens.go_on(hop + LOOKAHEAD)
        with own_random_numbers(pipeline.device) as resume:
            voice = SpokenPieces(pipeline, segment, tokens.limit, config.first_steps, config.context)
        while True:
            ids, ended = tokens.so_far()
            while not ended and len(ids) < said + hop + LOOKAHEAD:  # some were no speech
                tokens.go_on(said + hop + LOOKAHEAD - len(ids))
                ids, ended = tokens.so_far()
            if not len(ids):
                raise SynthesisError("T3 emitted its stop token first: there is no speech token to vocode")
            end = len(ids) if ended else said + hop
            following = min(config.longest, math.ceil(hop * config.growth))
            with resume():
                voice.launch(ids, end, last=ended)
            if self._on_gpu and not ended:
                tokens.go_on(following)
            with resume():
                piece = voice.take()
            yield piece
            if ended:
                return ids.cpu().long()
            if not self._on_gpu:
                tokens.go_on(following)
            said, hop = end, following


class TokenStream:
    """T3's tokens of one segment, as many at a time as are wanted; on a GPU in a stream of its own."""

    def __init__(self, decoder: Decoder, segment: Segment, stream: Any) -> None:
        self._decoder, self._stream = decoder, stream
        self._pinned = segment.n_tokens is not None
        self.limit = segment.n_tokens or decoder.pipeline.sampling.max_new_tokens
        self._steps = decoder.stream(segment)
        self._tokens = torch.zeros(0, dtype=torch.long)
        self._over = False
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def go_on(self, n: int) -> None:
        """Decode up to `n` more tokens; on a GPU this returns before they are there."""
        with self._aside():
            for _ in range(n):
                if (tokens := next(self._steps, None)) is None:
                    self._over = True
                    return
                self._tokens = tokens

    def so_far(self) -> tuple[Tensor, bool]:
        """The speech so far [n], on the device, and whether that is all of it; waits for what was launched."""
        with self._aside():
            tokens = self._tokens.cpu()
        ids, stopped = self._decoder.spoken(tokens, self._pinned)
        return ids.to(self._decoder.pipeline.device), stopped or self._over or len(tokens) >= self.limit

    def _aside(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
