"""The flow: S3Gen's encoder and estimator learn to turn speech tokens into mels, by conditional flow matching.

A flow matching model knows a velocity field that carries noise to data. Training draws a point on the straight line
from a noise sample z to a mel x, at time t, and asks for the line's direction x - z (Lipman et al. 2022). What the
field is told besides is what it gets at inference: the encoded tokens, a speaker vector, and the true mel of a
prompt at the beginning. One row in five is told nothing, so that classifier-free guidance has its other half.

Upstream ships a `compute_loss` for the same objective. This one differs in three places: it scores only frames
behind the prompt, which are all that inference keeps; prompts are as long as inference uses them; and there is no
padding. That last point is no convenience. `PreLookaheadLayer` looks three tokens ahead, and behind a padded
utterance it would see the padding's embedding where inference shows it zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen import decoder as upstream_decoder
from chatterbox.models.s3gen.flow import CausalMaskedDiffWithXvec
from chatterbox.models.s3gen.transformer import upsample_encoder as upstream_encoder
from torch import Tensor, nn

from harness.mini import models
from harness.mini.training import features
from harness.mini.training.captured import CapturedStep
from harness.mini.training.run import Run, learning_rate
from harness.mini.training.speech import Corpus
from harness.mini.training.vocoder import CHECKPOINT_EVERY, adam, set_rate

STEPS = 4_500
UTTERANCES = 11_000  # of the corpus, 16 h: what the flow learns is how sounds sound, not how words are spelled
PEAK = 1e-3  # learning rate
WINDOWS = (60, 120, 180, 240, 360, 720)  # tokens: 2.4 s to 28.8 s, prompt included
TOKENS_A_STEP = 17_280  # whatever the window's length
UNPROMPTED = 0.1  # share of windows without a prompt; the others' prompts fill up to LONGEST_PROMPT of them
LONGEST_PROMPT = 0.6
SAMPLES_A_TOKEN = 640  # 40 ms at 16 kHz
HELD_OUT = 0.01  # the end of each voice's line, for validation
CLIPS = 32  # speaker vectors of each voice and clip length


@dataclass
class Lines:
    """A corpus as one unbroken line of speech per voice: tokens and mel, aligned, two mel frames a token.

    Any stretch of a line is a training window. Windows reach across utterances, as at inference, where a prompt
    and new speech of the same voice follow each other; so they can be of any length and never need padding.
    """

    tokens: Tensor  # int16 [n]
    mel: Tensor  # float16 [2 n, 80]
    utterance_start: Tensor  # int64 [n]: where the utterance that owns this token begins
    utterance_stop: Tensor  # int64 [n]
    bounds: Tensor  # int64 [voices, 2]: each voice's line is tokens[start:stop]

    def split(self, share: float) -> tuple[Lines, Lines]:
        """The same lines without their last `share` (ten tokens at least), and that rest."""
        start, stop = self.bounds.unbind(1)
        border = stop - ((stop - start) * share).long().clamp(min=10)
        head, rest = torch.stack([start, border], 1), torch.stack([border, stop], 1)
        return replace(self, bounds=head), replace(self, bounds=rest)

    def draw(self, n: int, length: int, rng: torch.Generator) -> Window:
        """n windows of `length` tokens (or of the shortest line), over all voices alike.

        Half of them begin where an utterance begins, the others end where one ends, because at inference speech
        does both.
        """
        device = self.tokens.device
        length = min(length, int((self.bounds[:, 1] - self.bounds[:, 0]).min()))
        voices = torch.randint(len(self.bounds), (n,), generator=rng, device=device)
        first, stop = self.bounds[voices].unbind(1)
        anywhere = first + (torch.rand(n, generator=rng, device=device) * (stop - first - length)).long()
        beginning = self.utterance_start[anywhere]
        ending = self.utterance_stop[anywhere + length - 1] - length
        starts = torch.where(torch.rand(n, generator=rng, device=device) < 0.5, beginning, ending)
        starts = torch.minimum(torch.maximum(starts, first), stop - length)
        at = starts[:, None] + torch.arange(length, device=device)
        frames = 2 * starts[:, None] + torch.arange(2 * length, device=device)
        return Window(voices, self.tokens[at].long(), self.mel[frames].float().mT)


@dataclass
class Window:
    """A batch of windows: voice [B], tokens [B, L], mel [B, 80, 2 L]."""

    voices: Tensor
    tokens: Tensor
    mel: Tensor


def lay_out(corpus: Corpus, tokens: Tensor, starts: Tensor, lengths: Tensor, device: str) -> Lines:
    """Lines of a corpus and its tokens (flat, with each utterance's start and length), on `device`.

    The mel is computed here, once, along the line itself: utterances begin and end in silence, so frames at a seam
    are what they would be in the utterance alone.
    """
    voices, samples = (torch.from_numpy(np.array(a)) for a in (corpus.voices, corpus.starts))
    whole = torch.from_numpy(corpus.lengths // SAMPLES_A_TOKEN)
    order = torch.argsort(voices, stable=True)
    counts = torch.minimum(lengths, whole)[order]
    stops = counts.cumsum(0)
    n_tokens = torch.bincount(voices[order], weights=counts.double(), minlength=len(models.VOICES)).long()
    last = n_tokens.cumsum(0)

    audio = torch.from_numpy(np.array(corpus.audio)).to(device)
    pieces = zip(samples[order].to(device).split(200), counts.to(device).split(200), strict=True)
    mels = [mel_of_line(audio, begin, count) for begin, count in pieces]
    return Lines(
        tokens=tokens[ragged(starts[order], counts)].to(torch.int16).to(device),
        mel=torch.cat(mels),
        utterance_start=(stops - counts).repeat_interleave(counts).to(device),
        utterance_stop=stops.repeat_interleave(counts).to(device),
        bounds=torch.stack([last - n_tokens, last], 1).to(device),
    )


def ragged(starts: Tensor, counts: Tensor) -> Tensor:
    """Indices start, start + 1, ... of `counts` elements for each start, one after the other.

    >>> ragged(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    stops = counts.cumsum(0)
    shift = (starts - (stops - counts)).repeat_interleave(counts)
    return shift + torch.arange(len(shift), device=starts.device)


def mel_of_line(audio: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Mel [frames, 80] (float16) of utterances joined, each cut to a whole number of tokens."""
    wave = audio[ragged(starts, counts * SAMPLES_A_TOKEN)].float() / 32768
    return features.mel80(features.wav24(wave[None]))[0].T.half()


def speaker_vectors(corpus: Corpus, encoder: nn.Module, device: str, rng: torch.Generator, clips: int = 32) -> Tensor:
    """CAMPPlus vectors of clips of 2, 3, 4 and 6 s of every voice: [voices, 4 * CLIPS, 192].

    Training draws from them freely: the vector tells who speaks, and must not tell what is said.
    """
    audio, starts, lengths, voices = (
        torch.from_numpy(np.array(a)).to(device) for a in (corpus.audio, corpus.starts, corpus.lengths, corpus.voices)
    )
    bank = []
    for voice in range(len(models.VOICES)):
        vectors = []
        for seconds in (2, 3, 4, 6):
            samples = min(seconds * 16_000, int(lengths[voices == voice].max()))
            able = torch.nonzero((voices == voice) & (lengths >= samples)).squeeze(1)
            chosen = able[torch.randint(len(able), (CLIPS,), generator=rng, device=device)]
            room = torch.rand(CLIPS, generator=rng, device=device) * (lengths[chosen] - samples + 1)
            at = (starts[chosen] + room.long())[:, None] + torch.arange(samples, device=device)
            with torch.no_grad():
                vectors.append(encoder(features.campplus_fbank(audio[at].float() / 32768)))
        bank.append(torch.cat(vectors))
    return torch.stack(bank)


@dataclass
class Lesson:
    """A batch and all that is random in learning from it, so that the loss is a function of tensors alone."""

    tokens: Tensor  # [B, L]
    mel: Tensor  # [B, 80, 2 L]
    speakers: Tensor  # [B, 192]: CAMPPlus vectors
    prompts: Tensor  # [B]: length of each row's prompt, in mel frames
    told: Tensor  # [B, 1, 1], bool: whether the row is told anything
    time: Tensor  # [B, 1, 1]: where the row stands between noise and speech
    noise: Tensor  # [B, 80, 2 L]


def draw_lesson(window: Window, speakers: Tensor, prompts: Tensor, untold: float, rng: torch.Generator) -> Lesson:
    """A lesson on the window; `untold` is the share of rows that are told nothing, for guidance."""
    n, device = len(window.tokens), window.mel.device
    told = torch.rand(n, 1, 1, generator=rng, device=device) >= untold
    # More of the times lie near t = 0, where inference's cosine schedule also takes its smallest steps.
    time = 1 - torch.cos(torch.rand(n, 1, 1, generator=rng, device=device) * torch.pi / 2)
    noise = torch.randn(window.mel.shape, generator=rng, device=device)
    return Lesson(window.tokens, window.mel, speakers, prompts, told, time, noise)


def matching_loss(flow: CausalMaskedDiffWithXvec, lesson: Lesson) -> Tensor:
    """Flow matching loss of a batch: mean squared error of the velocity, over the frames behind each prompt."""
    n, length = lesson.tokens.shape
    device, mel = lesson.mel.device, lesson.mel
    lengths = torch.full((n,), length, device=device)
    encoded, _ = flow.encoder(flow.input_embedding(lesson.tokens), lengths)
    mu = flow.encoder_proj(encoded).mT
    speaker = flow.spk_embed_affine_layer(F.normalize(lesson.speakers, dim=1))
    prompted = (torch.arange(2 * length, device=device) < lesson.prompts[:, None]).unsqueeze(1)  # [B, 1, 2 L]

    remains = 1 - flow.decoder.sigma_min
    velocity = flow.decoder.estimator(
        x=(1 - remains * lesson.time) * lesson.noise + lesson.time * mel,
        mask=torch.ones(n, 1, 2 * length, device=device),
        # Guidance: at inference the unconditional half sees zeros for all three.
        mu=mu * lesson.told,
        t=lesson.time.flatten(),
        spks=speaker * lesson.told[:, 0],
        cond=mel * (prompted & lesson.told),
    )
    error = (velocity.float() - (mel - remains * lesson.noise)).square()
    return error.masked_fill(prompted, 0.0).sum() / ((~prompted).sum() * mel.shape[1])


def draw_prompts(n: int, frames: int, rng: torch.Generator) -> Tensor:
    """Prompt lengths [n] in mel frames, even, as prompts come in whole tokens."""
    share = torch.rand(n, generator=rng, device=rng.device) * LONGEST_PROMPT
    share = share.masked_fill(torch.rand(n, generator=rng, device=rng.device) < UNPROMPTED, 0.0)
    return (share * frames / 2).long() * 2


@contextlib.contextmanager
def no_chunk_masks() -> Iterator[None]:
    """Let upstream's mask helper hand its mask through.

    The helper reads a number back from the device in every block, to warn of rows that are masked altogether. Here
    nothing is masked, and each such read would stop the host from running ahead of the device.
    """

    def unchanged(_xs: Tensor, masks: Tensor, *_: object) -> Tensor:
        return masks

    with (
        mock.patch.object(upstream_decoder, "add_optional_chunk_mask", unchanged),
        mock.patch.object(upstream_encoder, "add_optional_chunk_mask", unchanged),
    ):
        yield


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train S3Gen's flow on the tokens of the tokenizer stage; writes its state to run.path("flow").

    Returns the validation loss (mean squared velocity error) and `mel_l1`, the distance of generated to real mels
    behind a prompt of a third of the window, in natural-log units.
    """
    torch.manual_seed(run.seed)
    rng = torch.Generator(run.device).manual_seed(run.seed)
    corpus = corpus.part(0, min(len(corpus), UTTERANCES))
    s3gen = models.build_s3gen()
    s3gen.speaker_encoder.load_state_dict(speaker_encoder_state(run))
    bank = speaker_vectors(corpus, s3gen.speaker_encoder.to(run.device).eval(), run.device, rng)
    learned = np.load(run.folder / "tokens.npz")
    tokens, starts, lengths = (
        torch.from_numpy(learned[key].astype(np.int64)) for key in ("tokens", "starts", "lengths")
    )
    starts, lengths = starts[: len(corpus)], lengths[: len(corpus)]
    lines, held_out = lay_out(corpus, tokens, starts, lengths, run.device).split(HELD_OUT)

    flow = s3gen.flow.to(run.device).train()
    optimizer = adam(flow.parameters(), PEAK)
    modules: dict[str, nn.Module] = {"flow": flow}
    optimizers: dict[str, torch.optim.Optimizer] = {"adam": optimizer}

    def learn(*lesson: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = half_precision_loss(flow, Lesson(*lesson))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.detach(), "gradient_norm": norm}

    learning = {length: CapturedStep(learn) for length in WINDOWS}
    steps, first = run.steps(STEPS), run.resume("flow", modules, optimizers)
    for step in range(first, steps):
        set_rate(optimizer, learning_rate(step, steps, PEAK, warmup=500))
        length = WINDOWS[step % len(WINDOWS)]
        lesson = draw(flow, lines, bank, length, TOKENS_A_STEP, rng)
        figures = learning[length](*vars(lesson).values())
        if step % 100 == 0 or step == steps - 1:
            run.log("flow", step, **{name: float(value) for name, value in figures.items()})
        if (step + 1) % CHECKPOINT_EVERY == 0:
            run.checkpoint("flow", step + 1, modules, optimizers)

    run.save("flow", flow.eval().state_dict())
    return validate(flow, held_out, bank, run.seed)


def draw(
    flow: CausalMaskedDiffWithXvec, lines: Lines, bank: Tensor, length: int, budget: int, rng: torch.Generator
) -> Lesson:
    """A lesson on as many windows of `length` tokens as the budget buys, each with some vector of its voice."""
    window = lines.draw(max(1, budget // length), length, rng)
    n, _, frames = window.mel.shape
    clips = torch.randint(bank.shape[1], (n,), generator=rng, device=rng.device)
    prompts = draw_prompts(n, frames, rng)
    return draw_lesson(window, bank[window.voices, clips], prompts, flow.decoder.training_cfg_rate, rng)


def half_precision_loss(flow: CausalMaskedDiffWithXvec, lesson: Lesson) -> Tensor:
    """`matching_loss`, on a GPU in bfloat16 where that is harmless."""
    device = lesson.mel.device.type
    with no_chunk_masks(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return matching_loss(flow, lesson)


@torch.no_grad()
def validate(flow: CausalMaskedDiffWithXvec, lines: Lines, bank: Tensor, seed: int) -> dict[str, float]:
    """Loss on held-out speech, and how far ten-step mels are from the real ones (L1, natural log)."""
    rng = torch.Generator(bank.device).manual_seed(seed)
    lessons = (draw(flow, lines, bank, length, TOKENS_A_STEP, rng) for length in WINDOWS)
    losses = [float(half_precision_loss(flow, lesson)) for lesson in lessons]
    window = lines.draw(min(16, TOKENS_A_STEP // 150 + 1), 150, rng)
    mel = generate(flow, window, bank[window.voices, 0], prompt=window.tokens.shape[1] // 3)
    distance = F.l1_loss(mel, window.mel[:, :, -mel.shape[2] :])
    return {"loss": sum(losses) / len(losses), "mel_l1": float(distance)}


def generate(flow: CausalMaskedDiffWithXvec, window: Window, speakers: Tensor, prompt: int) -> Tensor:
    """Upstream's own inference: mel [B, 80, 2 (L - prompt)] for the tokens behind the first `prompt` ones."""
    n, length = window.tokens.shape
    device = window.tokens.device
    mel, _ = flow.inference(
        token=window.tokens[:, prompt:],
        token_len=torch.full((n,), length - prompt, device=device),
        prompt_token=window.tokens[:, :prompt],
        prompt_token_len=torch.full((n,), prompt, device=device),
        prompt_feat=window.mel[:, :, : 2 * prompt].mT,
        prompt_feat_len=None,
        embedding=speakers,
        finalize=True,
    )
    return mel


def speaker_encoder_state(run: Run) -> dict[str, Tensor]:
    """CAMPPlus's weights as the speakers stage left them."""
    prefix = "speaker_encoder."
    state = run.load("speakers")
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
