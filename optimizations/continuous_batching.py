"""Requests that join the running batch, and leave it when they are said."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from harness.pipeline import Pipeline, Request, Segment
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.common.graphs import Capturer, Graphs
from optimizations.common.padding import padded_length
from optimizations.flow.prefix import LOOKAHEAD
from optimizations.flow.static_shape import FRAMES_PER_TOKEN, StaticEncoder
from optimizations.streams.pieces import (
    BEHIND,
    Next,
    SpokenPieces,
    launch_together,
    own_random_numbers,
    take_together,
)
from optimizations.streams.served import Pace, ServedStreams, Tally
from optimizations.t3.decoder import Decoder, decoder_of
from optimizations.t3.slots import Slots
from optimizations.vocoder.batched import SAMPLES_PER_FRAME

TEXT_POSITIONS = 512
"""Positions of a place beside those of the voice and of the speech: about as many as 40 s of text take."""
ENCODER_BUCKET = 32
"""Tokens to which the flow's encoder is padded: a solver's bucket of 64 frames, as `cuda_graphs` has it."""
MOST_TOGETHER = 8
"""As many rows as the flow's encoder is given at a time elsewhere (`flow/batched.py`)."""


@register
class ContinuousBatching(Optimization):
    """A desk for many callers, whose utterances are spoken together in pieces, as they come and go.

    Baseline: one utterance after the other. Whoever comes second waits until the first one is said to its end.
    This:
    - T3 has `slots` places, each at its own position (t3/slots.py). A request is read into a free place between two
      rounds of `round` tokens, and goes on with those who are there; the step is one captured graph.
    - Flow, vocoder and watermark make the next pieces of up to `together` utterances in one pass, those whose listeners
      will have nothing to hear first (streams/served.py). A first piece is `first` tokens and takes `first_steps` Euler
      steps; a later one takes what T3 has made by then, at least `growth` times as many, up to `longest`. `context`
      tokens are seen again, and of the voice's the last `prompt`, five seconds: of ten, most of a pass's work would be
      for a mel that nobody hears.
    Why: a step of T3 reads its weights for however many rows there are, and a GPU makes mels of eight prompts in less
    than eight times as long. A first piece waits for a round and a pass, and for nobody's end.
    Where not: one caller at a time is better served by `streaming`, whose T3 works for two rows and no more; whole
    utterances take the way they take without this. A place costs memory for its longest utterance, some 380 MB in
    bfloat16 at full size. A multilingual T3's guard judges its tokens on the host, one request at a time.
    What a request says is what it would say alone, but for rounding: rows do not see one another, and the random
    numbers of each are its seed's. They are not those of `synthesize`, whose generator is PyTorch's own.
    The campaign had nothing of the kind.
    Evidence: of the utterances, how many came while how many others were spoken; passes of the flow by their size.
    """

    name = "continuous_batching"
    extra = True
    lossless = False

    @dataclass
    class Config:
        """`slots`: utterances whose tokens are made at a time. `together`: pieces made in one pass; of those that take
        more steps than a first one, as many fewer while somebody has no sound yet. `round`: tokens. `prompt`: tokens
        of the voice's that the flow sees."""

        slots: int = number(48, least=1, most=256)
        together: int = number(8, least=1, most=MOST_TOGETHER)
        round: int = number(8, least=1)
        first: int = number(16, least=1)
        first_steps: int = number(5, least=1, most=10)
        growth: float = number(2.0, least=1)
        longest: int = number(100, least=1)
        context: int = number(50, least=0)
        prompt: int = number(125, least=1)

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if pipeline.silence or pipeline.model.s3gen.meanflow:
            return "continuous batching does not know a Turbo checkpoint yet: use one of the others"
        if pipeline.model.t3.hp.is_multilingual:
            return "a multilingual T3's guard judges one request at a time: use an English checkpoint"
        if other := pipeline.replaced_by.get("mel_to_wave"):
            return f"pieces go on with HiFT's source, and {other} has taken HiFT's place: switch one of them off"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self.server = StreamServer(pipeline, decoder_of(pipeline, self.name), self.config)
        pipeline.swap(pipeline, "server", self.server)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        server = self.server
        facts: dict[str, Any] = {
            "desks_count": server.n_desks,
            "joined_by_others_there": {str(n): count for n, count in sorted(server.tally.joined.items())},
            "passes_by_utterances": {str(n): count for n, count in sorted(server.tally.passes.items())},
        }
        if not server.n_desks:
            return Evidence(False, facts, "nobody opened a desk: try workload.scenario=loaded")
        if not any(n for n in server.tally.joined):
            return Evidence(False, facts, "nobody came while others were spoken")
        return Evidence(True, facts)


class StreamServer:
    """The pipeline's `server`. One desk is open at a time: a new one finds the places free."""

    def __init__(self, pipeline: Pipeline, decoder: Decoder, config: ContinuousBatching.Config) -> None:
        self.pipeline, self.decoder, self.config = pipeline, decoder, config
        self.n_desks = 0
        self.tally = Tally()
        self.graphs = Graphs(Capturer(pipeline.device)) if pipeline.device.type == "cuda" else Graphs()
        self._encoder = StaticEncoder(pipeline.model.s3gen.flow.encoder, self.graphs, ENCODER_BUCKET)
        self._slots: Slots | None = None
        self._desk: ServedStreams | None = None
        self._is_ready = False
        pipeline.on_undo(self.graphs.clear)

    def open(self) -> ServedStreams:
        self.n_desks += 1
        return self._open()

    def rehearse(self, request: Request) -> None:
        """Make what every shape takes, and speak for as many as have a pass together; the first time only."""
        if self._is_ready:
            return
        self._is_ready = True
        tally, self.tally = self.tally, Tally()
        with self.decoder.unrecorded():
            on_gpu = self.pipeline.device.type == "cuda"
            if on_gpu:
                self.prepare(request)
            desk = self._open()
            for caller in range(self.config.together if on_gpu else 1):
                desk.take(caller, request)
            while desk.work() is not None:
                pass
        self.tally = tally

    def _open(self) -> ServedStreams:
        config = self.config
        if self._desk is not None:
            self._desk.leave()
        slots = self._open_slots()
        pace = Pace(**{one.name: getattr(config, one.name) for one in fields(Pace)})
        self._desk = ServedStreams(self.pipeline, slots, pace, self._encode, self.tally)
        return self._desk

    def _open_slots(self) -> Slots:
        """The places, whose memory is taken when they are first asked for."""
        if self._slots is None:
            with torch.inference_mode():
                longest = self.decoder.opening() + TEXT_POSITIONS
                self._slots = Slots(self.decoder, self.config.slots, longest, self.graphs)
        return self._slots

    def _encode(self, _encoder: Any, embedded: Tensor, lengths: Tensor) -> Tensor:
        return self._encoder.forward(embedded, lengths)[0]

    def prepare(self, request: Request) -> None:
        """All shapes that there may be, over nobody's tokens, the largest first: each is captured."""
        config, pipeline = self.config, self.pipeline
        slots = self._open_slots()
        with pipeline.as_in_a_synthesis(), torch.inference_mode():
            slots.prepare(config.together)
            segment = pipeline.segments(request)[0]
            for exponent in reversed(range(config.together.bit_length())):
                for new in (*range(config.longest, config.first, -ENCODER_BUCKET), config.first):
                    for said in sorted({0, config.context}, reverse=True):
                        self._pass(segment, 1 << exponent, said, said + new)
                self._vocode(1 << exponent)

    def _vocode(self, n: int) -> None:
        """HiFT and the watermark over `n` windows of every length that there may be."""
        model, device = self.pipeline.model, self.pipeline.device
        hift, n_mels = model.s3gen.mel2wav, model.s3gen.flow.output_size
        most = BEHIND + FRAMES_PER_TOKEN * (self.config.longest + LOOKAHEAD)
        bucket = FRAMES_PER_TOKEN * ENCODER_BUCKET
        for frames in range(padded_length(most, bucket), 0, -bucket):
            mel = torch.zeros(n, n_mels, frames, device=device)
            hift.decode(x=mel, s=mel.new_zeros(n, 1, SAMPLES_PER_FRAME * frames))
        for samples in range(SAMPLES_PER_FRAME * most, 0, -model.sr):  # its buckets are seconds
            self.pipeline.stages["watermark"]([torch.zeros(samples, device=device)] * n)

    def _pass(self, segment: Segment, n: int, said: int, end: int) -> None:
        """A pass for `n` utterances that have come as far as `said`."""
        config, wanted = self.config, []
        ids = torch.zeros(end + LOOKAHEAD, dtype=torch.long, device=self.pipeline.device)
        with own_random_numbers(self.pipeline.device, 0) as resume:
            for _ in range(n):
                pieces = SpokenPieces(
                    self.pipeline, segment, len(ids), config.first_steps, config.context, config.prompt
                )
                pieces.said = said
                wanted.append(Next(pieces, ids, end, False, resume))
        launch_together(self.pipeline, wanted, self._encode)
        take_together(self.pipeline, [one.pieces for one in wanted])
