"""Launch a whole decode step, a whole solver step, a whole vocoder with one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from chatterbox.models.s3tokenizer import S3_TOKEN_RATE
from chatterbox.tts import Conditionals
from torch import Tensor

from harness.errors import UserError
from harness.pipeline import Pipeline, Segment, Stage
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.common.graphs import Body, Capturer, Graphs
from optimizations.common.kernels import for_device
from optimizations.common.padding import padded_length
from optimizations.common.probe import profile
from optimizations.flow.static_shape import FRAMES_PER_TOKEN, StaticEncoder, StaticSolver, Unasked
from optimizations.t3.captured_loop import CapturedLoop
from optimizations.t3.decoder import Decoder, decoder_of
from optimizations.t3.engines import StaticEngine
from optimizations.vocoder.static_shape import OWN_WAY, StaticVocoder
from optimizations.watermark.perth import Marker

TEXT_POSITIONS = 222
"""Cache positions to have ready beside those of the voice and the speech: about as many as 15 s of text take."""
VOCODER_BUCKET = 64
"""Mel frames, to whose multiples vocoded ones are padded."""
PROBE_GRAPHS = (1, 3)
URGENT = -1
"""The priority of what is captured: where T3 goes on beside it (`streaming`), T3 has the usual one, and waits."""


@register
class CudaGraphs(Optimization):
    """Captured work in all three stages: no Python and one launch, where there were hundreds of launches.

    Baseline: a token of T3 takes some thousand kernels, a step of the flow's solver as many, and the host needs longer
    to launch each than the GPU to run it. A fast GPU waits most of the time.

    This captures, in shapes that come back:
    - T3's decode step as a whole: embedding, layers over a static cache (kv_cache's, or one of its own), head,
      guidance, penalties, sampling, and the bookkeeping for the next step; by rows and by bucket of the cache. The
      sampling's settings lie on the device and may change at will; only a nucleus (top-p below 1) where there was none
      is another capture. As many steps as `poll` says are one graph, beside one of a single step: between two graphs a
      GPU waits. The host looks as often, and one look late, whether the end was reached; what ran beyond it is cut off,
      and its random numbers are given back. A step in one launch (`int8_weights`) does nothing beyond the end.
    - the flow's encoder and one step of its solver, by bucket of length; between them the host asks for nothing;
    - HiFT's source and HiFT itself, by bucket of length;
    - what `gpu_watermark` does, by seconds.
    Padding changes nothing in what is kept, see `flow/static_shape.py` and `vocoder/static_shape.py`. The warm-up
    captures all buckets up to `tokens`; what is longer is captured when it first comes, and counted. A full batch's
    cache is made for `batch_tokens`, since that of 64 texts is 16 MB a slot, and grows with what comes.

    Where not: where arithmetic or bandwidth sets the pace, as in large batches. Weights and caches must stay where they
    are, so `cpu_offload.profile=sequential` excludes it. A multilingual T3's guard judges every token on the host: its
    loop stays, and only the transformer's step in it is captured. In HiFT's place, a Vocos is left as it is.

    Lossless: in float32, greedy tokens are the ungraphed decoder's own. Sampling makes the draw of `torch.multinomial`
    with the same generator, but rounding differs, and a batch filled up with spare rows draws more: the same
    distribution, not always the same tokens. HiFT's random source is drawn on the device, as `fused_vocoder` does it.

    The campaign had nothing of the kind.

    Evidence: graphs by stage, replays, captures that an utterance had to wait for, the pool's bytes; and, from two
    profiled decodes of different length, launches per token.
    """

    name = "cuda_graphs"
    extra = True
    only_on_gpu = True

    @dataclass
    class Config:
        """`tokens`: speech to be ready for, 25 a second; `batch_tokens`: in a full batch. `flow_bucket`: mel frames.
        `poll`: tokens in a graph; up to twice as many are said beyond the end, to nobody."""

        tokens: int = number(500, least=1)
        batch_tokens: int = number(250, least=1)
        flow_bucket: int = number(32, least=1)
        poll: int = number(8, least=1)

        def __post_init__(self) -> None:
            if self.flow_bucket % FRAMES_PER_TOKEN:
                raise UserError(
                    f"optimizations.cuda_graphs.flow_bucket={self.flow_bucket}: give an even number, as a token is two "
                    "frames"
                )

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if pipeline.device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the pipeline is on {pipeline.device}: use device=cuda"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._capturer = Capturer(pipeline.device, priority=URGENT)
        self.apply_with(pipeline, self._capturer)

    def apply_with(self, pipeline: Pipeline, make: Callable[[Body], Body]) -> None:
        """Put the static shapes in place; `make` turns a function into what repeats it."""
        self.graphs = Graphs(make)
        pipeline.on_undo(self.graphs.clear)
        self._stages = ["generate_tokens", "tokens_to_mel"]
        self._capture_t3(pipeline)
        self._capture_flow(pipeline)
        if "mel_to_wave" not in pipeline.replaced_by:
            self._capture_vocoder(pipeline)
            self._stages.append("mel_to_wave")
        if isinstance(marker := pipeline.stages["watermark"], Marker):
            self._capture_watermark(pipeline, marker)
            self._stages.append("watermark")

    def _capture_t3(self, pipeline: Pipeline) -> None:
        self._decoder = decoder = decoder_of(pipeline, self.name)
        if not isinstance(decoder.engine, StaticEngine):
            pipeline.swap(decoder, "engine", StaticEngine(pipeline.model.t3.tfmr))
        loop = CapturedLoop(decoder, self.graphs, self.config.poll)
        pipeline.swap(decoder, "captured_loop", loop)

        def prepare() -> None:
            with self._preparing(pipeline):
                prompt = decoder.opening() + TEXT_POSITIONS
                spoken = {decoder.batch_size: self.config.batch_tokens, 1: self.config.tokens}
                positions = {n: prompt + n_tokens for n, n_tokens in spoken.items()}
                if decoder.reuse_prefix:
                    prompt = TEXT_POSITIONS
                with self._rehearsing(pipeline):
                    loop.prepare(positions, prompt=0)
                decoder.forget_prefixes()  # of a voice's, what kernels that did not run should have written
                loop.prepare(positions, prompt)

        pipeline.swap_item(vars(decoder), "prepare", prepare)

    def _capture_flow(self, pipeline: Pipeline) -> None:
        flow, bucket = pipeline.model.s3gen.flow, self.config.flow_bucket
        encoder = StaticEncoder(flow.encoder, self.graphs, bucket // FRAMES_PER_TOKEN)
        pipeline.swap(flow, "inference", Unasked(flow).inference)
        pipeline.swap(flow.encoder, "forward", encoder.forward)
        pipeline.swap(flow.decoder, "forward", StaticSolver(flow.decoder, self.graphs, bucket).forward)

        def prepare(stage: Stage) -> None:
            voices = sorted(pipeline.voices.values(), key=_prompt_tokens)
            lengths = self._lengths(_prompt_tokens(voices[0]), _prompt_tokens(voices[-1]))

            def speak(length: int) -> None:
                stage([torch.zeros(length, dtype=torch.long, device=pipeline.device)], [voices[0]])

            self._prepare_each(pipeline, lengths, speak)

        self._make_ready(pipeline, "tokens_to_mel", prepare)

    def _capture_vocoder(self, pipeline: Pipeline) -> None:
        hift, bucket = pipeline.model.s3gen.mel2wav, VOCODER_BUCKET
        pipeline.swap(hift, "stft_window", hift.stft_window.to(pipeline.device))
        vocoder = StaticVocoder(hift, self.graphs, bucket)
        pipeline.swap(hift, "inference", vocoder.inference)
        pipeline.swap(hift, "decode", vocoder.decode)
        pipeline.swap_item(vars(hift), OWN_WAY, vocoder.source)

        def prepare(stage: Stage) -> None:
            n_mels = pipeline.model.s3gen.flow.output_size
            longest = FRAMES_PER_TOKEN * self.config.tokens

            def speak(frames: int) -> None:
                stage([torch.zeros(1, n_mels, frames, device=pipeline.device)])

            self._prepare_each(pipeline, range(-(-longest // bucket) * bucket, 0, -bucket), speak)

        self._make_ready(pipeline, "mel_to_wave", prepare)

    def _capture_watermark(self, pipeline: Pipeline, marker: Marker) -> None:
        pipeline.swap(marker, "graphs", self.graphs)

        def prepare(stage: Stage) -> None:
            longest = padded_length(self.config.tokens * marker.rate // S3_TOKEN_RATE, marker.bucket)

            def speak(samples: int) -> None:
                stage([torch.zeros(samples, device=pipeline.device)])

            self._prepare_each(pipeline, range(longest, 0, -marker.bucket), speak)

        self._make_ready(pipeline, "watermark", prepare)

    def _lengths(self, shortest: int, longest: int) -> list[int]:
        """Speech tokens, most first, that fill each bucket up behind the shortest prompt, as far as any voice gets."""
        bucket = self.config.flow_bucket // FRAMES_PER_TOKEN
        last = -(-(longest + self.config.tokens) // bucket) * bucket
        return [total - shortest for total in range(last, shortest, -bucket)]

    def _prepare_each(self, pipeline: Pipeline, lengths: Sequence[int], speak: Callable[[int], None]) -> None:
        """Capture what each length takes, the longest first; kernels that the first and the last share, all do."""
        with self._rehearsing(pipeline):
            speak(lengths[0])
            speak(lengths[-1])
        for length in lengths:
            speak(length)

    @contextmanager
    def _rehearsing(self, pipeline: Pipeline) -> Iterator[None]:
        """Within, our kernels are compiled, all at once, and not run; PyTorch's run."""
        launching = for_device("optimizations.common.launching", pipeline.device)
        with self.graphs.rehearsing(), launching.compiled_together() if launching else nullcontext():
            yield

    def _make_ready(self, pipeline: Pipeline, name: str, prepare: Callable[[Stage], None]) -> None:
        """Have the warm-up call `prepare` with the stage as it is now."""

        def wrapped(stage: Stage) -> Prepared:
            def ready() -> None:
                with self._preparing(pipeline):
                    prepare(stage)

            return Prepared(stage, ready)

        pipeline.wrap_stage(name, wrapped)

    @contextmanager
    def _preparing(self, pipeline: Pipeline) -> Iterator[None]:
        """Everything as it is during a synthesis, since what is captured stays as it was."""
        with ExitStack() as contexts:
            for context in pipeline.around:
                contexts.enter_context(context())
            contexts.enter_context(torch.inference_mode())
            contexts.enter_context(self.graphs.preparing())
            yield

    def evidence(self, pipeline: Pipeline) -> Evidence:
        graphs = self.graphs
        facts: dict[str, Any] = {
            "graphs_captured_count": dict(graphs.captured),
            "replays_count": dict(graphs.replays),
            "captures_inside_utterances_count": dict(+graphs.unprepared),
            "pool_bytes": self._capturer.n_bytes,
            "sampling_captured": not self._decoder.guarded,
        }
        if idle := [stage for stage in self._stages if not graphs.replays[stage]]:
            return Evidence(False, facts, f"nothing was replayed in {' and '.join(idle)}")
        with self._decoder.unrecorded():
            facts["launches_per_token"] = launches_per_token(pipeline, self._decoder, self.config.poll)
        return Evidence(True, facts)


def _prompt_tokens(voice: Conditionals) -> int:
    return voice.gen["prompt_token"].shape[1]


class Prepared:
    """A stage that can get ready before anybody waits for it."""

    def __init__(self, stage: Stage, prepare: Callable[[], None]) -> None:
        self._stage = stage
        self.prepare = prepare

    def __call__(self, *args: Any) -> list[Tensor]:
        return self._stage(*args)


def launches_per_token(pipeline: Pipeline, decoder: Decoder, at_once: int) -> float:
    """Launches by the host, of kernels or of graphs of so many steps, that one more token takes."""
    voice = next(iter(pipeline.voices))
    counts = []
    for n_graphs in PROBE_GRAPHS:
        segment = Segment("Yes, it does.", pipeline.stages["condition"](voice), 0, 1 + n_graphs * at_once)
        decoder([segment])
        _, seen = profile(decoder, [segment])
        counts.append(sum(n for name, n in seen.ops.items() if "Launch" in name))
    return (counts[1] - counts[0]) / ((PROBE_GRAPHS[1] - PROBE_GRAPHS[0]) * at_once)
