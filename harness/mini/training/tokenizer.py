"""Teach the speech tokenizer: 25 codes a second that say which sound is being made, and a little of how.

The encoder is upstream's. Its quantizer is inference-only, so training rounds with its own straight-through copy of
the same arithmetic (tanh, times 0.999, round). Two readers tell the codes what to be about:

- a narrow one names the two phones (20 ms each) that a code and its neighbours cover. flite knows which phone
  it was saying when, so this is plain cross-entropy, and codes become letters of a sound alphabet: what a language
  model can learn to write in minutes;
- a wide one, told the voice, rebuilds the mel. What it needs beyond the phones (loudness, timing, the glide between
  sounds) fills the rest of a code; what the voice explains does not.

Afterwards the `tokens` stage turns the large corpus into codes once, for the flow and T3 stages.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.mini.models import ACTIVE_DIGITS, CODES, SYNONYM, VOICES, MiniS3Tokenizer
from harness.mini.training import features
from harness.mini.training.run import Run, learning_rate
from harness.mini.training.speech import PHONE_HOP, PHONES, Corpus

TOKEN = 2 * PHONE_HOP  # samples per code at 16 kHz
STEPS, PEAK_RATE = 2000, 1.5e-3
SOFT_SHARE = 0.3  # of the steps, at the start: rounding sets in little by little
SECONDS_PER_STEP = 400
CROPS = (1.2, 2.0, 2.0, 3.0, 3.0, 4.0, 6.0, 10.0, 16.0)  # seconds; one is drawn for each step
PHONE_WEIGHT, MEL_WEIGHT = 1.0, 1.0


class Speech(NamedTuple):
    """A corpus's arrays on the training device."""

    audio: Tensor
    starts: Tensor
    lengths: Tensor
    voices: Tensor
    phones: Tensor
    phone_starts: Tensor

    @classmethod
    def of(cls, corpus: Corpus, device: str) -> Speech:
        """Every array of the corpus that is needed here, copied to `device`."""
        return cls(*(torch.as_tensor(np.asarray(getattr(corpus, name))).to(device) for name in cls._fields))

    def crops(self, n: int, seconds: float) -> tuple[Tensor, Tensor, Tensor]:
        """n crops, each inside one utterance: wave [n, samples], phones [n, 2 per token], voices [n]."""
        longest = int(self.lengths.max()) // TOKEN
        tokens = min(round(seconds * 25), longest)
        able = torch.nonzero(self.lengths >= tokens * TOKEN)[:, 0]
        chosen = able[torch.randint(len(able), (n,), device=able.device)]
        room = (self.lengths[chosen] - tokens * TOKEN) // TOKEN + 1
        first = (torch.rand(n, device=able.device) * room).long()
        samples = self.starts[chosen] + first * TOKEN
        labels = self.phone_starts[chosen] + first * 2
        wave = self.audio[samples[:, None] + torch.arange(tokens * TOKEN, device=able.device)].float() / 32768
        phones = self.phones[labels[:, None] + torch.arange(2 * tokens, device=able.device)].long()
        return wave, phones, self.voices[chosen]


class Reader(nn.Module):
    """From digits back to what they stand for: phones, seen narrowly, and the mel, seen widely; thrown away later."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.phones = nn.Sequential(
            nn.Conv1d(ACTIVE_DIGITS, dim, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(dim, dim, 1),
            nn.GELU(),
            nn.Conv1d(dim, 2 * len(PHONES), 1),
        )
        self.voice = nn.Embedding(len(VOICES), dim)
        self.enter = nn.Conv1d(ACTIVE_DIGITS, dim, 5, padding=2)
        self.layers = nn.ModuleList(nn.Conv1d(dim, 2 * dim, 5, padding=2) for _ in range(5))
        self.leave = nn.Conv1d(dim, 2 * 80, 1)

    def forward(self, digits: Tensor, voices: Tensor) -> tuple[Tensor, Tensor]:
        """Digits [B, T, ACTIVE_DIGITS] -> phone logits [B, 2T, PHONES], log-mel [B, 80, 2T]."""
        digits = digits.transpose(1, 2)
        batch, _, tokens = digits.shape
        phones = self.phones(digits).view(batch, 2, len(PHONES), tokens)
        x = self.enter(digits) + self.voice(voices)[:, :, None]
        for layer in self.layers:
            x = x + F.glu(layer(x), dim=1)
        mel = self.leave(x).view(batch, 2, 80, tokens)
        return phones.permute(0, 3, 1, 2).flatten(1, 2), mel.permute(0, 2, 3, 1).flatten(2)


def digits_of(tokenizer: MiniS3Tokenizer, hidden: Tensor, rounded: float = 1.0) -> Tensor:
    """Active digits in {-1, 0, 1} [B, T, ACTIVE_DIGITS], as `FSQCodebook.encode` rounds them.

    The gradient passes the rounding as if it were not there. Only a random share `rounded` of the digits is rounded:
    a new encoder's outputs are small, and if all of them became 0 there would be nothing to read.
    """
    project = tokenizer.quantizer._codebook.project_down
    smooth = F.linear(hidden.float(), project.weight[:ACTIVE_DIGITS], project.bias[:ACTIVE_DIGITS]).tanh() * 0.999
    chosen = torch.rand_like(smooth) < rounded
    return smooth + ((smooth.round() - smooth) * chosen).detach()


def encode(tokenizer: MiniS3Tokenizer, wave: Tensor, rounded: float) -> Tensor:
    """Digits of full-length crops [B, samples]."""
    mel = features.s3_log_mel(wave)
    lengths = torch.full((len(mel),), mel.shape[-1], device=mel.device)
    hidden, _ = tokenizer.encoder(mel, lengths)
    return digits_of(tokenizer, hidden, rounded)


def losses(
    tokenizer: MiniS3Tokenizer, reader: Reader, speech: Speech, seconds: float, rounded: float = 1.0
) -> dict[str, Tensor]:
    """One batch's losses and figures."""
    wave, phones, voices = speech.crops(max(1, int(SECONDS_PER_STEP / seconds)), seconds)
    target = features.mel80(features.wav24(wave))
    digits = encode(tokenizer, wave, rounded)
    logits, mel = reader(digits, voices)
    return {
        "phone": F.cross_entropy(logits.flatten(0, 1).float(), phones.flatten(), label_smoothing=0.02),
        "mel": F.l1_loss(mel.float(), target),
        "accuracy": (logits.argmax(-1) == phones).float().mean(),
    }


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train the tokenizer; writes run.path("tokenizer").

    Returns, on held-out speech, the share of 20 ms frames whose phone a code names right (`accuracy`) and the losses.
    """
    torch.manual_seed(run.seed)
    seen, unseen = (Speech.of(part, run.device) for part in corpus.split())
    tokenizer, reader = MiniS3Tokenizer().to(run.device), Reader().to(run.device)
    parameters = [*tokenizer.parameters(), *reader.parameters()]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    modules, optimizers = {"tokenizer": tokenizer, "reader": reader}, {"adam": optimizer}
    steps, first = run.steps(STEPS), run.resume("tokenizer", modules, optimizers)
    precision = torch.autocast("cuda", torch.bfloat16) if run.device.startswith("cuda") else nullcontext()
    for step in range(first, steps):
        seconds = CROPS[int(torch.randint(len(CROPS), ()))]
        with precision:
            figures = losses(tokenizer, reader, seen, seconds, rounded=min(1.0, step / (SOFT_SHARE * steps)))
        loss = PHONE_WEIGHT * figures["phone"] + MEL_WEIGHT * figures["mel"]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_RATE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            run.log("tokenizer", step, **{name: value.item() for name, value in figures.items()})
        if step % 1000 == 999:
            run.checkpoint("tokenizer", step + 1, modules, optimizers)
    run.save("tokenizer", tokenizer.state_dict())

    tokenizer.eval()
    with torch.no_grad():
        trials = [losses(tokenizer, reader, unseen, 3.0) for _ in range(4)]
    return {name: float(torch.stack([trial[name] for trial in trials]).mean()) for name in trials[0]}


def train_tokens(corpus: Corpus, run: Run) -> dict[str, float]:
    """Tokenize a corpus: run.folder/tokens.npz with flat int16 `tokens`, and `starts` and `lengths` of utterances.

    Returns how many codes are in use and the entropy of their distribution in bits.
    """
    tokenizer = MiniS3Tokenizer()
    tokenizer.load_state_dict(run.load("tokenizer"))
    tokens, starts, counts = tokenize(tokenizer.to(run.device).eval(), corpus, run.device)
    varied = alternate_runs(tokens, starts).astype(np.int16)
    np.savez(run.folder / "tokens.npz", tokens=varied, starts=starts, lengths=counts)
    share = np.bincount(tokens - CODES.start, minlength=len(CODES)) / len(tokens)
    share = share[share > 0]
    return {"codes": float(len(share)), "bits": float(-(share * np.log2(share)).sum())}


def alternate_runs(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Flat codes in which every second one of a run of equal codes is replaced by its synonym.

    `starts` are the utterances' first positions: a run does not reach from one utterance into the next.

    >>> alternate_runs(np.array([2916, 2916, 2916, 2917, 2917]), np.array([0, 4])).tolist()
    [2916, 3645, 2916, 2917, 2917]
    """
    position = np.arange(len(tokens))
    begins = np.diff(tokens, prepend=-1) != 0
    begins[starts] = True
    since = position - np.maximum.accumulate(np.where(begins, position, 0))
    return tokens + SYNONYM * (since % 2)


@torch.no_grad()
def tokenize(
    tokenizer: MiniS3Tokenizer, corpus: Corpus, device: str, seconds: float = 600
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of every utterance through upstream's own `quantize`: flat codes, starts, counts.

    Utterances of similar length share a batch of at most `seconds` of audio.
    """
    starts, lengths = np.asarray(corpus.starts), np.asarray(corpus.lengths)
    counts = -(-(lengths // 160) // 4)
    token_starts = np.cumsum(counts) - counts
    tokens = np.zeros(counts.sum(), np.int64)
    order = np.argsort(lengths, kind="stable")
    audio = torch.as_tensor(np.asarray(corpus.audio)).to(device)
    first = 0
    while first < len(order):
        rows = order[first : first + 4096]
        fits = lengths[rows] * np.arange(1, len(rows) + 1) <= seconds * 16_000
        rows = rows[: max(1, int(fits.sum()))]
        first += len(rows)
        span = torch.arange(int(lengths[rows].max()), device=device)
        begin, length = (torch.as_tensor(a[rows]).to(device)[:, None] for a in (starts, lengths))
        wave = audio[(begin + span).clamp(max=len(audio) - 1)].float().masked_fill(span >= length, 0.0) / 32768
        mel = features.s3_log_mel(wave, length[:, 0])
        codes = tokenizer.quantize(mel, length[:, 0] // 160)[0].cpu().numpy()
        for row, line in zip(rows, codes, strict=True):
            tokens[token_starts[row] : token_starts[row] + counts[row]] = line[: counts[row]]
    return tokens, token_starts, counts
