"""Teach T3 to speak: text tokens in, speech tokens out, trained exactly as upstream's `T3.inference` will run
it.

A training example is one causal sequence,

    speaker | perceiver(prompt) | emotion | START text STOP | BOS BOS token_0 token_1 ... token_n-1

where both BOS carry speech position 0 and token_i position i + 1; the second BOS predicts token_0 and the
last token predicts the stop token. `T3.inference` starts from two BOS because `prepare_input_embeds` adds one
and the sampling loop another: a model trained with one would meet a layout it has never seen. Text is padded
behind the speech, never between the two, so batching shifts no position.

What makes a few minutes enough is the alignment. A T3 must first discover that speech walks through its text
from left to right; until then it learns to babble. Four things tell it early:

- both position tables start as sinusoids, with the speech positions slowed to the corpus's characters per token,
  so "where I am in the speech" and "where that is in the text" look alike before the first step;
- one head in each of three layers is guided: the probability of all monotonic walks through its attention map,
  summed by CTC (Badlani et al., "One TTS Alignment To Rule Them All", 2021), is maximized under a prior that knows
  which share of the phones has been spoken. The weight fades, the habit stays, and upstream's alignment analyzer
  later finds heads worth reading;
- a head that is thrown away afterwards names the phones to come, which are what a text is read for;
- the rest is regularization against learning the corpus by heart: dropout, random input tokens, dropped texts.

Dropped texts also give classifier-free guidance its second row: as there, the whole text embedding is zeroed
and the position embedding kept. A small loss on log Z keeps logits near log-probabilities, because upstream's
repetition penalty scales raw logits: on logits of 20 it would forbid every repeated sound, near 0 it only
nudges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.models.s3tokenizer.s3tokenizer import SPEECH_VOCAB_SIZE
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.tokenizers import EnTokenizer
from chatterbox.tts import punc_norm
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from harness.mini import models
from harness.mini.training import features
from harness.mini.training.muon import Muon
from harness.mini.training.run import Run
from harness.mini.training.speech import PHONES, Corpus

STEPS = 5500
WARMUP_STEPS = 150
DECAY_SHARE = 0.5  # of the steps, at the end: the learning rate falls linearly to zero
BATCH_POSITIONS = 32768
MATRIX_LR, TABLE_LR = 2e-3, 2e-3
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
RANDOM_TOKENS = 0.15
DROPPED_TEXTS = 0.15
LOG_Z_WEIGHT = 5e-3
GUIDE_WEIGHTS = (0.3, 0.05)  # at the start; in the middle of the training
REMINDER_EVERY = 4  # steps, from the middle on
PRIOR_WIDTH = 0.06  # of the prior on a walk: the share of characters minus the share of phones
PHONE_WEIGHT = 0.15
FRAMES_PER_TOKEN = 2  # of phone labels
PHONES_AHEAD = 3  # the one spoken in a token, and the two after it
EMBEDDING_STD = 0.1
EMOTION = 0.5
CLIP_NORM = 1.0
BLANK_LOGIT = -8.0  # CTC wants a blank; here a frame should look at some text
MASKED = -1e4
CONDITIONING = 18  # positions: a speaker, the perceiver's 16, an emotion
LOG_EVERY, CHECK_EVERY = 100, 1500  # steps


class Batch(NamedTuple):
    """Utterances padded to one length. The lengths stay on the CPU; `lay_out` sends them along."""

    text: Tensor  # [B, S] text ids from START to STOP
    text_lens: Tensor  # [B]
    speech: Tensor  # [B, N] speech codes
    speech_lens: Tensor  # [B]
    speaker: Tensor  # [B, 256]
    prompt: Tensor  # [B, P] speech codes
    phones: Tensor  # [B, N, PHONES_AHEAD] indices into `speech.PHONES`
    progress: Tensor  # [B, N] share of the phones begun, in [0, 1]


class Layout(NamedTuple):
    """Where things stand in the packed sequences; all on the device."""

    order: Tensor  # [B, L] indices into cond | padded text | padded speech that close the gap behind each text
    outputs: Tensor  # [B, N + 1] positions that predict token_0 ... stop
    n_cond: int
    text_lens: Tensor  # [B]
    frames: Tensor  # [B], tokens and the stop
    row: Tensor  # [M] which utterance each of the batch's M frames belongs to
    frame: Tensor  # [M] and which of its frames it is


class Forward(NamedTuple):
    hidden: Tensor  # [M, D] after the final norm, one row for each frame of the batch, without padding
    attention: dict[tuple[int, int], Tensor]  # (layer, head) -> log attention [B, N + 1, S] on the text
    layout: Layout


def guided_heads(n_layers: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs taught to align: one head in each of three layers below the middle."""
    return [(n_layers // 4 + i, 0) for i in range(3)]


def send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for: one `.to()` without pinned memory would drain the GPU's queue."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# The forward pass


def lay_out(n_cond: int, batch: Batch) -> Layout:
    """Positions of conditioning, text and speech when each utterance is packed without inner padding."""
    device = batch.text.device
    text_lens, frames = send(torch.stack((batch.text_lens, batch.speech_lens + 1)), device)
    width, n_speech = batch.text.size(1), batch.speech.size(1) + 2
    position = torch.arange(n_cond + width + n_speech, device=device)[None]
    gap = (width - text_lens[:, None]) * (position >= n_cond + text_lens[:, None])
    longest = n_cond + int((batch.text_lens + batch.speech_lens).max()) + 2
    order = (position + gap).clamp(max=n_cond + width + n_speech - 1)[:, :longest]
    outputs = n_cond + text_lens[:, None] + 1 + torch.arange(n_speech - 1, device=device)[None]
    total = int(batch.speech_lens.sum()) + len(batch.text)
    row = torch.repeat_interleave(torch.arange(len(batch.text), device=device), frames, output_size=total)
    frame = torch.arange(total, device=device) - (frames.cumsum(0) - frames)[row]
    return Layout(order, outputs.clamp(max=longest - 1), n_cond, text_lens, frames, row, frame)


def embed(t3: T3, batch: Batch, text_dropped: Tensor | None = None) -> tuple[Tensor, Layout]:
    """Input embeddings [B, L, D] in upstream's layout.

    `text_dropped` [B] zeroes texts as upstream does in the second row of classifier-free guidance.
    """
    rows, device = batch.text.size(0), batch.text.device
    emotion = torch.full((rows, 1, 1), EMOTION, device=device)
    cond = t3.prepare_conditioning(
        T3Cond(speaker_emb=batch.speaker, cond_prompt_speech_tokens=batch.prompt, emotion_adv=emotion)
    )
    text = t3.text_emb(batch.text)
    if text_dropped is not None:
        text = text.masked_fill(text_dropped[:, None, None], 0.0)
    text = text + t3.text_pos_emb(batch.text)
    bos = batch.speech.new_full((rows, 2), t3.hp.start_speech_token)
    positions = torch.arange(-1, batch.speech.size(1) + 1, device=device).clamp(min=0)
    speech = t3.speech_emb(torch.cat((bos, batch.speech), 1)) + t3.speech_pos_emb.get_fixed_embedding(positions)
    layout = lay_out(cond.size(1), batch)
    x = torch.cat([part.to(product_dtype(text)) for part in (cond, text, speech)], 1)
    return x.gather(1, layout.order[..., None].expand(-1, -1, x.size(-1))), layout


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` are done here: autocast's where it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Rotation(torch.autograd.Function):
    """Rotary position embedding of [B, L, H, head_dim], halves paired as in Llama.

    Its derivative is the rotation back, which needs nothing kept and half the kernels autograd would launch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(turned, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotation.apply(gradient, cos, -sin), None, None


def block(
    layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A Llama layer with dropout on both residual branches, which transformers' own lacks.

    Returns the new [B, L, D] and the rotated queries and keys [B, H, L, head_dim]. A layer this narrow waits for
    memory, not for arithmetic: so products that share an input are one product, and the norms' weights are folded
    into the matrices behind them, where they cost nothing.
    """
    attention, mlp = layer.self_attn, layer.mlp
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    dim, eps = x.shape[-1:], norm1.variance_epsilon
    in_qkv = torch.cat([linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)])
    qkv = F.linear(F.rms_norm(x, dim, eps=eps), in_qkv * norm1.weight).unflatten(-1, (-1, attention.head_dim))
    heads = qkv.size(2) // 3
    q, k = Rotation.apply(qkv[:, :, : 2 * heads], cos, sin).transpose(1, 2).chunk(2, 1)
    v = qkv[:, :, 2 * heads :].transpose(1, 2)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    x = x + F.dropout(attention.o_proj(a.transpose(1, 2).flatten(2)), dropout)
    in_mlp = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    gate, up = F.linear(F.rms_norm(x, dim, eps=eps), in_mlp * norm2.weight).chunk(2, -1)
    return x + F.dropout(mlp.down_proj(F.silu(gate) * up), dropout), q, k


def forward(
    t3: T3,
    batch: Batch,
    heads: list[tuple[int, int]] | None = None,
    text_dropped: Tensor | None = None,
    dropout: float = 0.0,
) -> Forward:
    """Teacher-forced pass over upstream's weights; also the log attention of `heads` from speech to text."""
    x, layout = embed(t3, batch, text_dropped)
    x = F.dropout(x, dropout)
    positions = torch.arange(x.size(1), device=x.device)[None]
    half = t3.cfg.head_dim // 2  # the tables' second half repeats the first
    cos, sin = (table[:, :, None, :half].to(x.dtype) for table in t3.tfmr.rotary_emb(x, positions))
    attention = {}
    for index, layer in enumerate(t3.tfmr.layers):
        x, q, k = block(layer, x, cos, sin, dropout)
        for spied, head in heads or ():
            if spied == index:
                attention[spied, head] = log_text_attention(q[:, head], k[:, head], layout, batch.text.size(1))
    said = layout.row * x.size(1) + layout.outputs[layout.row, layout.frame]
    return Forward(t3.tfmr.norm(x.flatten(0, 1).index_select(0, said)), attention, layout)


def log_text_attention(q: Tensor, k: Tensor, layout: Layout, width: int) -> Tensor:
    """Log attention [B, N + 1, S] of one head's speech positions on the text; the rest of it lies elsewhere."""
    index = layout.outputs[..., None].expand(-1, -1, q.size(-1))
    scores = (q.gather(1, index) @ k.mT).float() / math.sqrt(q.size(-1))
    future = torch.arange(k.size(1), device=k.device) > layout.outputs[..., None]
    log_attention = scores.masked_fill(future, MASKED).log_softmax(-1)
    padding = torch.arange(width, device=k.device) >= layout.text_lens[:, None]
    return log_attention[..., layout.n_cond :][..., :width].masked_fill(padding[:, None], MASKED)


def code_logits(t3: T3, hidden: Tensor) -> Tensor:
    """Logits over the packed vocabulary: codes in use, special tokens, one entry for all codes never used.

    The tokenizer uses few of upstream's 6561 codes. The others share one output row, counted as often as it
    stands for: the same distribution as upstream's full softmax at a fraction of the work.
    """
    rows = models.pack_table(t3.speech_head.weight)
    shared = rows.new_zeros(len(rows))
    shared[-1] = math.log(SPEECH_VOCAB_SIZE - len(models.CODES))
    return F.linear(hidden, rows) + shared  # the sum is float32


def packed_ids(tokens: Tensor) -> Tensor:
    """Speech tokens (codes in use, start, stop) as indices into the packed vocabulary."""
    special = tokens - SPEECH_VOCAB_SIZE + len(models.CODES)
    return torch.where(tokens >= SPEECH_VOCAB_SIZE, special, tokens - models.CODES.start)


# The losses


def targets_of(t3: T3, out: Forward, batch: Batch) -> Tensor:
    """Target tokens [M]: each utterance's speech tokens, then the stop token."""
    row, frame = out.layout.row, out.layout.frame
    tokens = F.pad(batch.speech, (0, 1))[row, frame]
    return tokens.masked_fill(frame == out.layout.frames[row] - 1, t3.hp.stop_speech_token)


def guide_loss(log_attention: Tensor, progress: Tensor, text_lens: Tensor, frames: Tensor) -> Tensor:
    """How far an attention map [B, T, S] is from one monotonic walk through the whole text, in nats a frame.

    CTC sums over all walks that visit every pair of neighbouring characters (one alone may be shorter than a
    speech token), each weighted by how far it strays from `progress` [B, T], the share of the utterance's phones
    begun by then. The attention that leaves the text is charged too. The lengths [B] are on the CPU.
    """
    device = log_attention.device
    width = log_attention.size(-1)
    on_text = log_attention.logsumexp(-1)
    pairs = F.pad(log_attention - on_text[..., None], (0, width % 2), value=MASKED).unflatten(-1, (-1, 2)).logsumexp(-1)
    n_pairs = (text_lens + 1) // 2
    n_pairs_there, lens = send(torch.stack((n_pairs, frames)), device)
    s = torch.arange(pairs.size(-1), device=device)[None, None] / n_pairs_there[:, None, None]
    prior = -((s - progress[..., None]) ** 2) / (2 * PRIOR_WIDTH**2)
    emission = F.pad(pairs + prior, (1, 0), value=BLANK_LOGIT).log_softmax(-1)
    labels = torch.arange(1, pairs.size(-1) + 1, device=device).expand(len(text_lens), -1)
    walks = F.ctc_loss(emission.transpose(0, 1), labels, frames, n_pairs, reduction="none", zero_infinity=True) / lens
    valid = torch.arange(progress.size(1), device=device)[None] < lens[:, None]
    elsewhere = (-on_text * valid).sum(1) / lens
    return (walks + elsewhere).mean()


def guided_maps(
    out: Forward, batch: Batch, rows: Tensor, heads: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `guide_loss` for these rows (on the CPU) of a batch, one head after the other."""
    there = send(rows, batch.text.device)
    maps = torch.cat([out.attention[head][there] for head in heads])
    progress = F.pad(batch.progress[there], (0, 1), value=1.0).repeat(len(heads), 1)
    text_lens, frames = (lens[rows].repeat(len(heads)) for lens in (batch.text_lens, batch.speech_lens + 1))
    return maps, progress, text_lens, frames


def phone_loss(phone_head: nn.Linear, out: Forward, batch: Batch) -> Tensor:
    """Cross-entropy of the phone spoken in each token and those after it, in nats a phone; the stop has none."""
    row, frame = out.layout.row, out.layout.frame
    phones = F.pad(batch.phones, (0, 0, 0, 1))[row, frame]
    phones = phones.masked_fill((frame == out.layout.frames[row] - 1)[:, None], -100)
    logits = phone_head(out.hidden).float().unflatten(-1, (PHONES_AHEAD, -1))
    return F.cross_entropy(logits.flatten(0, 1), phones.flatten())


def speech_loss(t3: T3, out: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats a token, and the mean square of log Z."""
    logits = code_logits(t3, out.hidden)
    log_z = logits.logsumexp(-1)
    right = logits.gather(-1, packed_ids(targets_of(t3, out, batch))[:, None])[:, 0]
    return (log_z - right).mean(), log_z.square().mean()


# The data


@dataclass
class Examples:
    """Every utterance's text and speech tokens, flat on the device."""

    text: Tensor  # [characters]
    speech: Tensor  # [tokens]
    text_lens: Tensor  # [n], on the CPU
    speech_lens: Tensor  # [n], on the CPU
    phones: Tensor  # [tokens, PHONES_AHEAD]
    progress: Tensor  # [tokens]
    voices: np.ndarray
    speakers: Tensor  # [voices, clips, 256]
    prompt_len: int

    def __post_init__(self) -> None:
        device, n_voices = self.text.device, self.speakers.size(0)
        both = self.text_lens, self.speech_lens
        self.text_spans, self.speech_spans = (torch.stack((n.cumsum(0) - n, n)).to(device) for n in both)
        long_enough = self.speech_lens.numpy() >= min(self.prompt_len, int(self.speech_lens.median()))
        self.prompts = [np.flatnonzero(long_enough & (self.voices == voice)) for voice in range(n_voices)]

    def __len__(self) -> int:
        return len(self.text_lens)

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """These utterances, each conditioned on another one of the same voice."""
        others = self._others(rows, rng)
        shortest = min(self.prompt_len, int(self.speech_lens[others].min()))
        clips = self.voices[rows] * self.speakers.size(1) + rng.integers(self.speakers.size(1), size=len(rows))
        there, others_there, clips_there = send(torch.from_numpy(np.stack((rows, others, clips))), self.text.device)
        text_lens, speech_lens = self.text_lens[rows], self.speech_lens[rows]
        text = _ragged(self.text_spans[:, there], int(text_lens.max()))
        speech = _ragged(self.speech_spans[:, there], int(speech_lens.max()))
        prompt = _ragged(self.speech_spans[:, others_there], shortest)
        return Batch(
            text=self.text[text].long(),
            text_lens=text_lens,
            speech=self.speech[speech].long(),
            speech_lens=speech_lens,
            speaker=self.speakers.flatten(0, 1)[clips_there],
            prompt=self.speech[prompt].long(),
            phones=self.phones[speech].long(),
            progress=self.progress[speech],
        )

    def positions(self) -> np.ndarray:
        """Sequence positions of each utterance: what it costs."""
        return (self.text_lens + self.speech_lens).numpy() + CONDITIONING + 2

    def random_tokens(self, shape: torch.Size) -> Tensor:
        """Speech tokens drawn from the corpus, as often as they occur in it."""
        return self.speech[torch.randint(len(self.speech), shape, device=self.speech.device)].long()

    def _others(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each utterance another one of its voice, one long enough to fill the prompt if there is any."""
        others = np.empty_like(rows)
        for voice in np.unique(self.voices[rows]):
            here = self.voices[rows] == voice
            others[here] = rng.choice(self.prompts[voice], here.sum())
        return others


def _ragged(spans: Tensor, width: int) -> Tensor:
    """Indices [rows, width] into a flat tensor, from starts and lengths [2, rows]; a row's last item repeats."""
    start, length = spans[..., None]
    return start + torch.minimum(torch.arange(width, device=spans.device)[None], length - 1)


def text_ids(tokenizer: EnTokenizer, text: str, start: int, stop: int) -> list[int]:
    """A text as `ChatterboxTTS.generate` hands it to T3: punctuation normalized, between START and STOP."""
    return [start, *tokenizer.encode(punc_norm(text)), stop]


def batches(lengths: np.ndarray, rows: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """These rows, each once, in random batches of similar lengths whose padded size stays within `budget`."""
    order = rows[np.argsort(lengths[rows] * rng.uniform(0.95, 1.05, len(rows)), kind="stable")]
    found: list[np.ndarray] = []
    batch: list[int] = []
    longest = 0
    for row in order:
        longest = max(longest, int(lengths[row]))
        if batch and longest * (len(batch) + 1) > budget:
            found.append(np.array(batch))
            batch, longest = [], int(lengths[row])
        batch.append(row)
    found.append(np.array(batch))
    return [found[i] for i in rng.permutation(len(found))]


# The training


def build_phone_head(t3: T3) -> nn.Linear:
    """Names phones from T3's hidden states; only for training."""
    return nn.Linear(t3.dim, PHONES_AHEAD * len(PHONES), bias=False, device=t3.device)


def initialize(t3: T3, tokens_per_character: float) -> None:
    """Start both position tables as sinusoids that run at the same pace through text and speech.

    Token embeddings start small, so that position is not drowned by identity, and unused codes start equal,
    so that they stay so.
    """
    with torch.no_grad():
        for table in (t3.text_emb.weight, t3.speech_emb.weight):
            table.normal_(std=EMBEDDING_STD)
        for weight in (t3.speech_emb.weight, t3.speech_head.weight):
            weight.copy_(models.unpack_table(models.pack_table(weight)))
        for table, pace in ((t3.text_pos_emb, 1.0), (t3.speech_pos_emb, 1 / tokens_per_character)):
            table.emb.weight.copy_(sinusoids(len(table.emb.weight), t3.dim, pace) * EMBEDDING_STD)


def sinusoids(length: int, dim: int, pace: float) -> Tensor:
    """[length, dim] sines and cosines of `pace * position`, wavelengths from 2 pi to 2000 pi."""
    frequency = 1000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = pace * torch.arange(length)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), 1)


def optimizers(t3: T3, phone_head: nn.Linear) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the transformer's matrices, AdamW for the tables, heads, norms and the conditioning."""
    matrices = [p for p in t3.tfmr.layers.parameters() if p.ndim == 2]
    unused = {id(p) for part in (t3.tfmr.embed_tokens, t3.text_head) for p in part.parameters()}
    taken = unused | {id(p) for p in matrices}
    others = [p for p in (*t3.parameters(), *phone_head.parameters()) if id(p) not in taken]
    muon = Muon(matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY)
    adamw = torch.optim.AdamW(others, lr=TABLE_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=t3.device.type == "cuda")
    return muon, adamw


def pace(step: int, steps: int) -> float:
    """The share of the full learning rate: a short warm-up, a plateau, a linear fall to zero."""
    return min(1.0, (step + 1) / min(WARMUP_STEPS, steps / 10), (steps - step) / (DECAY_SHARE * steps))


def guide_weight(step: int, steps: int) -> float:
    """Weight of the alignment loss: falls linearly until the middle of the training, then a reminder now and then."""
    first, last = GUIDE_WEIGHTS
    falling = first + (last - first) * 2 * step / steps
    return falling if step < steps / 2 else last * (step % REMINDER_EVERY == 0)


def training_loss(
    t3: T3, phone_head: nn.Linear, examples: Examples, batch: Batch, guide: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """One noisy, regularized step's loss and its parts."""
    random = torch.rand(batch.speech.shape, device=batch.speech.device) < RANDOM_TOKENS
    noisy = batch._replace(speech=torch.where(random, examples.random_tokens(batch.speech.shape), batch.speech))
    dropped = torch.rand(len(batch.text)) < DROPPED_TEXTS
    heads = guided_heads(len(t3.tfmr.layers))
    out = forward(t3, noisy, heads if guide else None, send(dropped, batch.text.device), DROPOUT)
    speech, log_z = speech_loss(t3, out, batch)
    phones = phone_loss(phone_head, out, batch)
    loss = speech + LOG_Z_WEIGHT * log_z + PHONE_WEIGHT * phones
    parts = {"nats": speech.detach(), "log_z": log_z.detach().sqrt(), "phones": phones.detach()}
    told = torch.nonzero(~dropped)[:, 0]
    if guide and len(told):
        walk = guide_loss(*guided_maps(out, batch, told, heads))
        loss = loss + guide * walk
        parts["walk"] = walk.detach()
    return loss, parts


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train T3 on the tokens of the tokenizer stage; writes its state as the run's "t3".

    Returns held-out figures: see `validate`.
    """
    t3 = models.build_t3()
    examples = load_examples(corpus, run, t3.hp)
    torch.manual_seed(run.seed)
    initialize(t3, float(examples.speech_lens.sum() / examples.text_lens.sum()))
    t3.to(run.device).train()
    phone_head = build_phone_head(t3)
    muon, adamw = optimizers(t3, phone_head)
    modules, optimizer = {"t3": t3, "phones": phone_head}, {"muon": muon, "adamw": adamw}
    steps, first = run.steps(STEPS), run.resume("t3", modules, optimizer)
    torch.manual_seed(run.seed + first)
    rng = np.random.default_rng((run.seed, first))

    taught, held_out = split_rows(corpus)
    lengths = examples.positions()
    schedule: list[np.ndarray] = []
    for step in range(first, steps):
        if not schedule:
            schedule = batches(lengths, taught, BATCH_POSITIONS, rng)
        with autocast(t3):
            batch = examples.batch(schedule.pop(), rng)
            loss, parts = training_loss(t3, phone_head, examples, batch, guide_weight(step, steps))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(t3.parameters(), CLIP_NORM)
        muon.param_groups[0]["lr"] = MATRIX_LR * pace(step, steps)
        adamw.param_groups[0]["lr"] = TABLE_LR * pace(step, steps)
        for opt in (muon, adamw):
            opt.step()
            opt.zero_grad()
        if step % LOG_EVERY == 0 or step == steps - 1:
            run.log("t3", step, **{name: float(value) for name, value in parts.items()}, gradient_norm=float(norm))
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            run.log("t3", step, **validate(t3, examples, held_out[:256]))
            run.checkpoint("t3", step + 1, modules, optimizer)
    run.save("t3", t3.state_dict())
    return validate(t3, examples, held_out)


def split_rows(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the held-out utterances."""
    n_taught = len(corpus.split()[0])
    return np.arange(n_taught), np.arange(n_taught, len(corpus))


def autocast(t3: T3) -> torch.autocast:
    """bfloat16 products on a GPU, nothing on a CPU."""
    return torch.autocast(t3.device.type, torch.bfloat16, enabled=t3.device.type == "cuda")


@torch.no_grad()
def validate(t3: T3, examples: Examples, rows: np.ndarray) -> dict[str, float]:
    """Held-out figures.

    `nats` a token with the text and without it, `accuracy`: the share of tokens guessed right, `log_z`: its root
    mean square, and `walk`: the guided heads' `guide_loss`.
    """
    t3.eval()
    heads = guided_heads(len(t3.tfmr.layers))
    rng = np.random.default_rng(0)
    sums, n_tokens = np.zeros(5), 0
    for chosen in batches(examples.positions(), rows, BATCH_POSITIONS, rng):
        batch = examples.batch(chosen, rng)
        everyone = torch.arange(len(chosen))
        with autocast(t3):
            told = forward(t3, batch, heads)
            untold = forward(t3, batch, text_dropped=torch.ones_like(everyone, dtype=torch.bool, device=t3.device))
            nats, log_z = speech_loss(t3, told, batch)
            blind, _ = speech_loss(t3, untold, batch)
            walk = guide_loss(*guided_maps(told, batch, everyone, heads))
            right = (code_logits(t3, told.hidden).argmax(-1) == packed_ids(targets_of(t3, told, batch))).float().mean()
        n = int((batch.speech_lens + 1).sum())
        sums += n * np.array([float(figure) for figure in (nats, blind, right, log_z, walk)])
        n_tokens += n
    t3.train()
    nats, blind, right, log_z, walk = sums / n_tokens
    return {"nats": nats, "nats_without_text": blind, "accuracy": right, "log_z": log_z**0.5, "walk": walk}


def load_examples(corpus: Corpus, run: Run, hp) -> Examples:
    """The corpus's texts and the tokenizer stage's speech tokens on the device, with a speaker bank per
    voice."""
    tokenizer = models.build_tokenizer()
    texts = [text_ids(tokenizer, text, hp.start_text_token, hp.stop_text_token) for text in corpus.texts]
    text_lens = np.array([len(ids) for ids in texts])
    learned = np.load(run.folder / "tokens.npz")
    phones, progress = phones_ahead(corpus, learned["lengths"])
    return Examples(
        text=torch.from_numpy(np.concatenate(texts).astype(np.int16)).to(run.device),
        speech=torch.from_numpy(learned["tokens"].astype(np.int16)).to(run.device),
        text_lens=torch.from_numpy(text_lens),
        speech_lens=torch.from_numpy(learned["lengths"].astype(np.int64)),
        phones=torch.from_numpy(phones).to(run.device),
        progress=torch.from_numpy(progress).to(run.device),
        voices=np.asarray(corpus.voices),
        speakers=speaker_bank(corpus, run).to(run.device),
        prompt_len=hp.speech_cond_prompt_len,
    )


def phones_ahead(corpus: Corpus, n_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every speech token of the corpus: the phone it speaks and the next ones, int8 [tokens, PHONES_AHEAD], and
    the share of its utterance's phones begun by then, float32 [tokens].
    """
    starts = np.asarray(corpus.phone_starts)
    counts = np.diff(np.append(starts, len(corpus.phones)))
    begins = np.diff(corpus.phones, prepend=-1) != 0
    begins[starts] = True
    phone = np.asarray(corpus.phones)[begins]
    number = np.cumsum(begins) - 1  # of the phone that each frame belongs to
    first, last = number[starts], number[starts + counts - 1]
    row = np.repeat(np.arange(len(starts)), n_tokens)
    token = np.arange(len(row)) - np.repeat(np.cumsum(n_tokens) - n_tokens, n_tokens)
    current = number[starts[row] + np.minimum(FRAMES_PER_TOKEN * token + 1, counts[row] - 1)]
    ahead = current[:, None] + np.arange(PHONES_AHEAD)
    phones = np.where(ahead <= last[row, None], phone[np.minimum(ahead, len(phone) - 1)], PHONES.index("pau"))
    return phones.astype(np.int8), ((current - first[row]) / (last - first + 1)[row]).astype(np.float32)


def speaker_bank(corpus: Corpus, run: Run, clips: int = 32) -> Tensor:
    """Embeddings [voices, clips, 256] of clips of each voice, their silent ends cut, as `embeds_from_wavs` does."""
    encoder = models.build_voice_encoder()
    prefix = "voice_encoder."
    state = run.load("speakers")
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    encoder.to(run.device).eval()
    rng = np.random.default_rng(run.seed)
    mels = []
    for voice in range(len(models.VOICES)):
        for row in rng.choice(np.flatnonzero(np.asarray(corpus.voices) == voice), clips):
            wave = corpus.audio[corpus.starts[row] :][: corpus.lengths[row]].astype(np.float32) / 32768
            loud = np.flatnonzero(np.abs(wave) > 0.1 * np.abs(wave).max())
            spoken = torch.from_numpy(wave[loud[0] : loud[-1] + 1]).to(run.device)
            mels.append(features.ve_mel(spoken[None])[0].cpu().numpy())
    return torch.from_numpy(encoder.embeds_from_mels(mels, rate=1.3)).unflatten(0, (len(models.VOICES), clips))
