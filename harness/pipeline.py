"""The shared Chatterbox pipeline: named stages that an optimization may wrap or replace.

    split_text        text -> segments
    condition         voice -> conditionals (the voice prompt, for T3 and for S3Gen)
    generate_tokens   segments -> speech tokens, 25 per second of audio    (T3: bound by launches or by bandwidth)
    tokens_to_mel     speech tokens -> mel, 80 bins at 50 frames/s         (S3Gen's flow: bound by arithmetic)
    mel_to_wave       mel -> 24 kHz wave                                   (HiFT: one pass of convolutions)
    join              the waves of one utterance's segments -> one wave
    watermark         waves -> watermarked waves                           (Perth)

The baseline's stages call `chatterbox-tts` itself, in upstream's order and with upstream's random numbers, so
`Pipeline.synthesize` returns the very bits of `ChatterboxTTS.generate` for the same seed on the same device.

Every change that a plugin makes goes through `replace_stage`, `wrap_stage`, `enter_around`, `call_between`, `set_data`,
`prepare`, `rehearse`, or those of `harness.changes`: `swap`, `wrap`, `swap_item`. It is written down, and undone by
`reset`: the pipeline remembers how to become the baseline again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox import mtl_tts
from chatterbox.models.s3tokenizer import EOS, SOS, SPEECH_VOCAB_SIZE
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import ChatterboxTTS, Conditionals, punc_norm
from torch import Tensor

from harness.changes import Changeable, same
from harness.errors import UserError
from harness.measure import Moment, synchronize
from harness.sampling import Sampling

LABELS = ("name", "trained")
"""Attributes of a pipeline that say something about it and do nothing."""
STAGES = ("split_text", "condition", "generate_tokens", "tokens_to_mel", "mel_to_wave", "join", "watermark")
HELD_BACK = -1e4
"""A logit that never wins, yet survives classifier-free guidance, penalties and half precision (no inf - inf)."""


class SynthesisError(RuntimeError):
    """The model produced nothing that can be spoken; the utterance counts as missing, never as fast."""


@dataclass(frozen=True)
class Request:
    """One utterance to speak. `n_tokens` pins its number of speech tokens; None lets the model stop itself.

    `seed` None leaves PyTorch's random numbers as the caller has them; `language` None is the pipeline's.
    """

    text: str
    voice: str
    seed: int | None
    n_tokens: int | None = None
    language: str | None = None


@dataclass
class Teacher:
    """Makes a segment say `tokens` [n] whatever T3 would say, and keeps what it would have said.

    `logits` comes to hold, for each token, the guided logits [SPEECH_VOCAB_SIZE] of its step, in float32. A loop that
    does not know teachers leaves it empty.
    """

    tokens: Tensor
    logits: list[Tensor] = field(default_factory=list)

    def listen(self, logits: Tensor) -> int | None:
        """Keep a step's guided logits [V]; the token to say instead, None when all is said."""
        if len(self.logits) == len(self.tokens):
            return None
        self.logits.append(logits[:SPEECH_VOCAB_SIZE].float().clone())
        return int(self.tokens[len(self.logits) - 1])


@dataclass
class Segment:
    """A piece of one utterance's text, with the voice that speaks it. A `teacher` needs `n_tokens`, its tokens."""

    text: str
    conditionals: Conditionals
    utterance: int
    n_tokens: int | None = None
    teacher: Teacher | None = None
    language: str | None = None


@dataclass
class Utterance:
    """What came out: `wave` is mono float32 in [-1, 1]; `tokens` holds one int64 tensor [n] per segment, on the CPU.

    In a batch, `generation_time_s` and `stages_s` are the batch's, shared by its utterances.
    """

    wave: np.ndarray
    sample_rate: int
    tokens: list[Tensor]
    segments: list[str]
    stages_s: dict[str, float]
    generation_time_s: float
    token_cap: int = 1000

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens)

    @property
    def audio_s(self) -> float:
        return len(self.wave) / self.sample_rate

    @property
    def hit_token_cap(self) -> bool:
        """Whether a segment ran into upstream's limit, so that its end was cut off."""
        return any(len(tokens) >= self.token_cap for tokens in self.tokens)


@dataclass
class Chunk:
    """A piece of an utterance: finished and watermarked `wave`, mono float32; put end to end they are the utterance.

    `ready_s` is when it was there, in seconds since the call.
    """

    wave: np.ndarray
    sample_rate: int
    ready_s: float

    @property
    def audio_s(self) -> float:
        return len(self.wave) / self.sample_rate


Chunks = Generator[Chunk, None, Utterance]


class Streamer(Protocol):
    """What speaks in chunks."""

    def __call__(self, request: Request) -> Chunks:
        """`Pipeline.synthesize_stream`."""
        ...

    def rehearse(self, request: Request) -> None:
        """The same, to nobody."""
        ...


Told = list[tuple[int, Chunk | Utterance | Exception]]
"""What has come of several callers' requests: their next chunks; what an utterance was, when all of it is told; or why
there is none."""


class Desk(Protocol):
    """What speaks for several callers at a time."""

    def take(self, caller: int, request: Request) -> None:
        """A caller's request has come."""
        ...

    def work(self) -> Told | None:
        """Go on a little; None where there is nothing to do."""
        ...


class Server(Protocol):
    """What speaks for several callers at a time, as many times as somebody opens it."""

    def open(self) -> Desk:
        """A desk with nobody at it."""
        ...

    def rehearse(self, request: Request) -> None:
        """Speak to nobody, so that whatever happens once has happened."""
        ...


Stage = Callable[..., Any]
ContextFactory = Callable[[], AbstractContextManager]


@dataclass
class Pipeline(Changeable):
    """Upstream's model behind named stages.

    `model` has upstream's attributes `t3`, `s3gen`, `ve`, `tokenizer`, `watermarker` and `sr`; `voices` maps the
    names of built-in voices to their conditionals; `trained` is False when the weights come from a seed.
    """

    model: ChatterboxTTS
    device: torch.device
    voices: dict[str, Conditionals]
    name: str = "chatterbox"
    trained: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    language: str | None = "en"
    stages: dict[str, Stage] = field(default_factory=dict)
    n_starts: ClassVar[int] = 2
    """Start tokens that open the speech, all at its position 0."""
    start_stays_seen: ClassVar[bool] = True
    """Whether the start token counts as a repetition for every token, or for the first one only."""
    silence: ClassVar[tuple[int, ...]] = ()
    """Speech tokens that the flow is given behind each segment's own."""
    around: list[ContextFactory] = field(default_factory=list)
    between: list[Callable[[str], None]] = field(default_factory=list)
    streamer: Streamer | None = None
    server: Server | None = None
    replaced_by: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage in STAGES:
            self.stages[stage] = getattr(self, f"_{stage}")

    # -- speaking ------------------------------------------------------------------------------------------------

    def synthesize(
        self, text: str, voice: str, seed: int | None, n_tokens: int | None = None, language: str | None = None
    ) -> Utterance:
        """Speak one text. The seed fixes every random draw, as `torch.manual_seed` before upstream's `generate`."""
        return self.synthesize_batch([Request(text, voice, seed, n_tokens, language)])[0]

    def synthesize_batch(self, requests: list[Request]) -> list[Utterance]:
        """Speak several texts in one pass of the stages; the first request's seed fixes the random draws.

        Raises SynthesisError when the model gives no speech token for a segment.
        """
        if not requests:
            return []
        clock = _StageClock(self.device, self.between)
        if requests[0].seed is not None:
            seed_draws(requests[0].seed, self.device)
        with self.as_in_a_synthesis():
            texts = [clock.run("split_text", self.stages["split_text"], request.text) for request in requests]
            conditionals = [clock.run("condition", self.stages["condition"], r.voice) for r in requests]
            segments = _segments(requests, texts, conditionals)
            voices = [segment.conditionals for segment in segments]
            with torch.inference_mode():
                tokens = clock.run("generate_tokens", self.stages["generate_tokens"], segments)
                if any(len(t) == 0 for t in tokens):
                    raise SynthesisError("T3 emitted its stop token first: there is no speech token to vocode")
                mels = clock.run("tokens_to_mel", self.stages["tokens_to_mel"], self.with_silence(tokens), voices)
                pieces = clock.run("mel_to_wave", self.stages["mel_to_wave"], mels)
                grouped = _by_utterance(segments, pieces)
                joined = [clock.run("join", self.stages["join"], waves) for waves in grouped]
                waves = clock.run("watermark", self.stages["watermark"], joined)
        elapsed, seconds = clock.stop()
        return [
            Utterance(
                wave=wave,
                sample_rate=self.model.sr,
                tokens=[t.cpu().long() for t in spoken],
                segments=text,
                stages_s=seconds,
                generation_time_s=elapsed,
                token_cap=self.sampling.max_new_tokens,
            )
            for wave, spoken, text in zip(waves, _by_utterance(segments, tokens), texts, strict=True)
        ]

    def synthesize_stream(
        self, text: str, voice: str, seed: int | None, n_tokens: int | None = None, language: str | None = None
    ) -> Chunks:
        """Speak one text in chunks, as they are ready; the generator returns the whole utterance.

        Unmodified there is one chunk, at the end. Raises SynthesisError as `synthesize` does.
        """
        if self.streamer:
            return (yield from self.streamer(Request(text, voice, seed, n_tokens, language)))
        utterance = self.synthesize(text, voice, seed, n_tokens, language)
        yield Chunk(utterance.wave, utterance.sample_rate, utterance.generation_time_s)
        return utterance

    def desk(self) -> Desk:
        """Who speaks for several callers: unmodified, one utterance after the other, in the order of the requests."""
        return self.server.open() if self.server else OneAtATime(self.synthesize_stream)

    def segments(self, request: Request) -> list[Segment]:
        """A request's text in segments, with the voice that speaks them; to be called `as_in_a_synthesis`."""
        return _segments(
            [request], [self.stages["split_text"](request.text)], [self.stages["condition"](request.voice)]
        )

    @contextmanager
    def as_in_a_synthesis(self) -> Iterator[None]:
        """Within, everything is as it is around a synthesis."""
        with ExitStack() as contexts:
            for context in self.around:
                contexts.enter_context(context())
            yield

    # -- changing ------------------------------------------------------------------------------------------------

    def replace_stage(self, stage: str, fn: Stage, by: str) -> None:
        """Put `fn` in a stage's place. Raises UserError if another plugin already did."""
        if (owner := self.replaced_by.get(stage)) not in (None, by):
            raise UserError(f"{by} and {owner} both replace the stage {stage}: switch one of them off")
        self.swap_item(self.replaced_by, stage, by)
        self.swap_item(self.stages, stage, fn)

    def wrap_stage(self, stage: str, wrapper: Callable[[Stage], Stage]) -> None:
        """Put `wrapper(current)` in a stage's place; wrappers nest, the last one outermost."""
        self._swap_item(self.stages, stage, wrapper(self.stages[stage]), wraps=True)

    def enter_around(self, context: ContextFactory) -> None:
        """Enter `context()` around every synthesis."""
        self._add(self.around, context, "around")

    def call_between(self, hook: Callable[[str], None]) -> None:
        """Call `hook(stage)` at each stage's end, inside that stage's time."""
        self._add(self.between, hook, "between")

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Give a tensor of the model other numbers, another dtype or another layout; the old ones wait on the CPU.

        Kept on a GPU, they would hide the memory that the change saves. float32 survives the journey bit for bit.
        """
        original, device = tensor.data.cpu(), tensor.device

        def restore() -> None:
            tensor.data = original.to(device)

        self.on_undo(restore)
        tensor.data = data
        if not _equal(tensor, original):
            kind = data.dtype, data.shape  # and not the data, whose memory may be wanted elsewhere
            self._note(
                f"weights in {str(data.dtype).removeprefix('torch.')}",
                (id(tensor), "data"),
                tensor,
                lambda: _equal(tensor, original),
                lambda: (tensor.dtype, tensor.shape) == kind,
            )

    def prepare(self) -> list[str]:
        """Have every stage that can get ready do so, before anybody waits for it; their names."""
        ready = [name for name, stage in self.stages.items() if hasattr(stage, "prepare")]
        for name in ready:
            self.stages[name].prepare()  # type: ignore[attr-defined]
            self._note(f"{name} got ready", ("prepare", name))
        return ready

    def rehearse(self, text: str, voice: str, seed: int, n_tokens: int | None = None) -> Utterance:
        """Speak to nobody: what happens once has then happened before the first request."""
        for speaker in (self.streamer, self.server):
            if speaker:
                speaker.rehearse(Request(text, voice, seed, n_tokens))
        spoken = self.synthesize(text, voice, seed, n_tokens)
        self._note("utterance rehearsed", ("rehearse", len(self._journal)))
        return spoken

    def _add(self, entries: list, entry: Any, where: str) -> None:
        entries.append(entry)
        self.on_undo(lambda: entries.remove(entry))
        name = getattr(entry, "__qualname__", type(entry).__qualname__)
        there = partial(_holds, entries, entry)
        self._note(f"{where} {name}", (where, len(self._journal)), is_undone=lambda: not there(), is_there=there)

    def _matters(self, owner: object, key: Any) -> bool:
        if owner is self:
            return key not in LABELS
        return owner is not self.replaced_by and (owner is not self.stages or key in STAGES)

    # -- the baseline's stages: upstream's own calls, in upstream's order ------------------------------------------

    def _split_text(self, text: str) -> list[str]:
        return [text]

    def _condition(self, voice: str) -> Conditionals:
        """A built-in voice by its name, or a reference clip by its path, as `generate` prepares them."""
        model, exaggeration = self.model, self.sampling.exaggeration
        if voice in self.voices:
            model.conds = self.voices[voice]
        else:
            model.prepare_conditionals(voice, exaggeration=exaggeration)
        if exaggeration != model.conds.t3.emotion_adv[0, 0, 0]:
            cond = model.conds.t3
            model.conds.t3 = T3Cond(
                speaker_emb=cond.speaker_emb,
                cond_prompt_speech_tokens=cond.cond_prompt_speech_tokens,
                emotion_adv=exaggeration * torch.ones(1, 1, 1),
            ).to(device=self.device)
        return model.conds

    def _generate_tokens(self, segments: list[Segment]) -> list[Tensor]:
        """Speech tokens [n] per segment, one segment after the other."""
        return [self._generate_one(segment) for segment in segments]

    def _generate_one(self, segment: Segment) -> Tensor:
        s, t3 = self.sampling, self.model.t3
        if s.greedy:  # in words of upstream's loop, which would divide by the temperature
            s = replace(s, temperature=1.0, min_p=1.0, top_p=1.0)
        with ExitStack() as contexts:
            if self.sampling.greedy:
                contexts.enter_context(random_numbers_kept(self.device))
            if not s.guided and not self.is_multilingual:
                contexts.enter_context(unguided(t3))
            if segment.n_tokens:
                contexts.enter_context(stop_held_back(t3))
            if segment.teacher:
                contexts.enter_context(taught(t3, segment.teacher, s.cfg_weight))
            tokens = t3.inference(
                t3_cond=segment.conditionals.t3,
                text_tokens=self.text_tokens(segment.text, segment.language),
                max_new_tokens=segment.n_tokens or s.max_new_tokens,
                temperature=s.temperature,
                cfg_weight=s.cfg_weight,
                repetition_penalty=s.repetition_penalty,
                min_p=s.min_p,
                top_p=s.top_p,
            )
        return self.speech_only(tokens[0]).to(self.device)

    def speech_only(self, tokens: Tensor) -> Tensor:
        """What upstream gives its flow of sampled ids [n]: those behind a start token, up to the stop, that are speech.

        Of several start or stop tokens the first one counts; upstream raises a TypeError then.
        """
        ids = tokens.tolist()
        begin = ids.index(SOS) + 1 if SOS in ids else 0
        end = ids.index(EOS) if EOS in ids else len(ids)
        said = tokens[begin:end]
        if max(ids[begin:end], default=0) < SPEECH_VOCAB_SIZE:
            return said.clone()  # what `speech` gives, without asking the device how many there are
        return speech(said)

    @property
    def is_multilingual(self) -> bool:
        """Whether a text has to be told to the model with its language."""
        return isinstance(self.model, mtl_tts.ChatterboxMultilingualTTS)

    def text_tokens(self, text: str, language: str | None = None, wait: bool = True) -> Tensor:
        """Text token ids [2, n] with start and stop, one row for each side of classifier-free guidance.

        `language` None is the pipeline's. As upstream's, the host waits until they are on the device, unless it is not
        to `wait`.
        """
        t3, tokenizer = self.model.t3, self.model.tokenizer
        if self.is_multilingual:
            language = language or self.language
            tokens = tokenizer.text_to_tokens(mtl_tts.punc_norm(text), language_id=language)
        else:
            tokens = tokenizer.text_to_tokens(punc_norm(text))
        tokens = tokens.to(self.device) if wait else tokens
        tokens = torch.cat([tokens, tokens], dim=0)
        tokens = F.pad(tokens, (1, 0), value=t3.hp.start_text_token)
        tokens = F.pad(tokens, (0, 1), value=t3.hp.stop_text_token)
        return tokens.to(self.device, non_blocking=True)

    def with_silence(self, tokens: list[Tensor]) -> list[Tensor]:
        """Speech tokens [n] of segments as the flow is given them."""
        if not self.silence:
            return tokens
        return [torch.cat((row, row.new_tensor(self.silence))) for row in tokens]

    def _tokens_to_mel(self, tokens: list[Tensor], conditionals: list[Conditionals]) -> list[Tensor]:
        """Mels [1, 80, 2 n], one segment after the other."""
        s3gen = self.model.s3gen
        return [
            s3gen.flow_inference(t, ref_dict=c.gen, finalize=True).to(dtype=s3gen.dtype)
            for t, c in zip(tokens, conditionals, strict=True)
        ]

    def _mel_to_wave(self, mels: list[Tensor]) -> list[Tensor]:
        """Waves [samples] on the device, 480 samples per mel frame, their first 20 ms silenced as upstream does."""
        return [self._vocode(mel) for mel in mels]

    def _vocode(self, mel: Tensor) -> Tensor:
        s3gen = self.model.s3gen
        wave, _ = s3gen.hift_inference(mel, None)
        wave[:, : len(s3gen.trim_fade)] *= s3gen.trim_fade
        return wave.squeeze(0)

    def _join(self, waves: list[Tensor]) -> Tensor:
        return waves[0] if len(waves) == 1 else torch.cat(waves)

    def _watermark(self, waves: list[Tensor]) -> list[np.ndarray]:
        """Watermarked waves as float32 arrays; on the CPU, as upstream."""
        mark = self.model.watermarker.apply_watermark
        return [mark(wave.detach().cpu().numpy(), sample_rate=self.model.sr) for wave in waves]


class OneAtATime:
    """A desk that speaks one utterance after the other, in the order in which they were asked for."""

    def __init__(self, stream: Callable[..., Chunks]) -> None:
        self._stream = stream
        self._waiting: deque[tuple[int, Request]] = deque()
        self._now: tuple[int, Chunks] | None = None

    def take(self, caller: int, request: Request) -> None:
        self._waiting.append((caller, request))

    def work(self) -> Told | None:
        """One more chunk, or the end of the utterance, which has no audio of its own."""
        if self._now is None:
            if not self._waiting:
                return None
            caller, one = self._waiting.popleft()
            self._now = caller, self._stream(one.text, one.voice, one.seed, one.n_tokens, one.language)
        caller, chunks = self._now
        try:
            return [(caller, next(chunks))]
        except StopIteration as end:
            self._now = None
            return [(caller, end.value)]
        except SynthesisError as error:
            self._now = None
            return [(caller, error)]


def _equal(tensor: Tensor, original: Tensor) -> bool:
    """Whether a tensor has an original's numbers, dtype and layout."""
    if (tensor.dtype, tensor.shape, tensor.stride()) != (original.dtype, original.shape, original.stride()):
        return False
    return torch.equal(tensor.cpu(), original)


def _holds(entries: list, entry: Any) -> bool:
    return any(same(held, entry) for held in entries)


# -- helpers that optimizations share ------------------------------------------------------------------------------


def speech(tokens: Tensor) -> Tensor:
    """Sampled ids [n] without those that are no speech: start, stop and the unused ids above them."""
    return tokens[tokens < SPEECH_VOCAB_SIZE]


def share_tokens(total: int, weights: list[int]) -> list[int]:
    """Split `total` tokens over segments in proportion to `weights`, at least one each, nothing lost.

    >>> share_tokens(10, [1, 1, 2])
    [2, 3, 5]
    """
    edges = np.round(np.cumsum([0, *weights]) / sum(weights) * total).astype(int)
    counts = np.maximum(np.diff(edges), 1)
    counts[counts.argmax()] += total - counts.sum()
    return counts.tolist()


@contextmanager
def stop_held_back(t3: torch.nn.Module) -> Iterator[None]:
    """Let upstream's loop sample speech only, so that `max_new_tokens` alone decides its length.

    Everything still runs: the multilingual analyzer does its work on a copy of the logits and is not obeyed.
    """

    def only_speech(_module: torch.nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., SPEECH_VOCAB_SIZE:] = HELD_BACK
        return logits

    analyze = AlignmentStreamAnalyzer.step

    def observe(self: AlignmentStreamAnalyzer, logits: Tensor, next_token: int | None = None) -> Tensor:
        analyze(self, logits.clone(), next_token=next_token)
        return logits

    handle = t3.speech_head.register_forward_hook(only_speech)
    AlignmentStreamAnalyzer.step = observe
    try:
        yield
    finally:
        AlignmentStreamAnalyzer.step = analyze
        handle.remove()


@contextmanager
def unguided(t3: torch.nn.Module) -> Iterator[None]:
    """Let upstream's loop do without guidance, which its English model cannot: the start token always has two rows.

    The loop keeps both rows; the transformer and its head are given the first, and the second gets the same logits, so
    that guidance, weighted 0, adds nothing.
    """

    def first_row(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"][:1]}

    def both_rows(_module: torch.nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        return logits.expand(2, -1, -1)

    handles = [
        t3.tfmr.register_forward_pre_hook(first_row, with_kwargs=True),
        t3.speech_head.register_forward_hook(both_rows),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    """Whatever is drawn inside, what follows draws the same numbers."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def taught(t3: torch.nn.Module, teacher: Teacher, cfg_weight: float) -> Iterator[None]:
    """Have upstream's loop say what the teacher wants: every other token is held back behind its speech head."""

    def obey(_module: torch.nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        conditional, unconditional = logits[0, -1], logits[-1, -1]
        token = teacher.listen(conditional + cfg_weight * (conditional - unconditional))
        if token is None:
            return logits
        only = torch.full_like(logits, HELD_BACK)
        only[..., token] = 0.0  # which no penalty changes
        return only

    handle = t3.speech_head.register_forward_hook(obey)
    try:
        yield
    finally:
        handle.remove()


def seed_draws(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does for the draws of a pipeline on that device.

    PyTorch asks every kind of device that there may be, which takes it a tenth of a millisecond and more.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        gpu_generator(device).manual_seed(seed)


def gpu_generator(device: torch.device) -> torch.Generator:
    """PyTorch's own of that GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


class _StageClock:
    """Seconds per stage, as the device goes through them: the host does not wait at a stage's end."""

    def __init__(self, device: torch.device, hooks: list[Callable[[str], None]]) -> None:
        synchronize(device)
        self._device = device
        self._hooks = hooks
        self._start = time.perf_counter()
        self._stages: list[str] = []
        self._moments = [Moment(device)]

    def run(self, stage: str, fn: Stage, *args: Any) -> Any:
        result = fn(*args)
        for hook in self._hooks:
            hook(stage)
        self._stages.append(stage)
        self._moments.append(Moment(self._device))
        return result

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds until all is done, and those of each stage."""
        synchronize(self._device)
        elapsed = time.perf_counter() - self._start
        seconds = dict.fromkeys(STAGES, 0.0)
        for stage, (before, after) in zip(self._stages, pairwise(self._moments), strict=True):
            seconds[stage] += after.since(before)
        return elapsed, seconds


def _segments(requests: list[Request], texts: list[list[str]], conditionals: list[Conditionals]) -> list[Segment]:
    segments = []
    for index, (request, pieces, voice) in enumerate(zip(requests, texts, conditionals, strict=True)):
        counts: list[int | None] = [None] * len(pieces)
        if request.n_tokens:
            counts = [*share_tokens(request.n_tokens, [len(piece) for piece in pieces])]
        segments += [
            Segment(piece, voice, index, n, language=request.language) for piece, n in zip(pieces, counts, strict=True)
        ]
    return segments


def _by_utterance(segments: list[Segment], items: list[Any]) -> list[list[Any]]:
    pairs = zip(segments, items, strict=True)
    return [[item for _, item in group] for _, group in groupby(pairs, key=lambda pair: pair[0].utterance)]
