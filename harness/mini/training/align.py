"""Which attention heads follow the text? Measure all of them, keep the best three for upstream's analyzer.

`AlignmentStreamAnalyzer` averages three heads' attention on the text and reads from it where in the sentence
the speech is: it holds the stop token back until the end is reached, and forces it when the speech lingers
there. In the full-size model those heads were found by looking; here they are found by one number, the walk
mass: the average share of a frame's attention that lies on the best monotonic walk from the first characters
to the last.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3 import t3 as upstream
from chatterbox.models.t3.inference import alignment_stream_analyzer
from chatterbox.models.t3.modules.cond_enc import T3Cond
from torch import Tensor

from harness.mini import models
from harness.mini.training.run import Run
from harness.mini.training.speech import Corpus
from harness.mini.training.t3 import EMOTION, Batch, Examples, autocast, forward, load_examples, split_rows

MEASURED = 96  # utterances
SPOKEN = 24
MAX_TOKENS = 1000  # where `generate()` gives up
LONGEST_STEP = 3  # characters a walk may advance in one speech token
MARGIN = 4  # it starts among this many first characters and ends among this many last ones


def walk_mass(log_attention: Tensor, text_lens: Tensor, frames: Tensor) -> Tensor:
    """The largest mean attention [B] along a monotonic walk through attention maps given as logs [B, T, S].

    A walk advances by 0 to `LONGEST_STEP` characters a frame. 1 is a head that does nothing but follow the
    text.
    """
    attention = log_attention.exp()
    n_frames, width = attention.shape[1:]
    device = attention.device
    text_lens, frames = text_lens.to(device), frames.to(device)
    column = torch.arange(width, device=device)
    best = attention[:, 0].masked_fill(column >= MARGIN, -torch.inf)
    for t in range(1, n_frames):
        reachable = torch.stack(
            [torch.nn.functional.pad(best, (step, 0), value=-torch.inf)[:, :width] for step in range(LONGEST_STEP + 1)]
        )
        best = torch.where((t < frames)[:, None], reachable.amax(0) + attention[:, t], best)
    at_end = (column >= text_lens[:, None] - MARGIN) & (column < text_lens[:, None])
    return best.masked_fill(~at_end, -torch.inf).amax(1).clamp(min=0) / frames


@torch.no_grad()
def measure_heads(t3: T3, examples: Examples, rows: np.ndarray) -> dict[tuple[int, int], float]:
    """Mean walk mass of every (layer, head) on these utterances."""
    heads = [(layer, head) for layer in range(len(t3.tfmr.layers)) for head in range(t3.cfg.num_attention_heads)]
    batch = examples.batch(rows, np.random.default_rng(0))
    with autocast(t3):
        out = forward(t3, batch, heads)
    frames = batch.speech_lens + 1
    return {head: float(walk_mass(out.attention[head], batch.text_lens, frames).mean()) for head in heads}


def best_heads(masses: dict[tuple[int, int], float], n: int = 3) -> list[tuple[int, int]]:
    """The n heads with the largest walk mass, best first."""
    return sorted(masses, key=masses.__getitem__, reverse=True)[:n]


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Measure every head of the trained T3 and write the best three to align.json.

    Returns their walk masses and what upstream's analyzer, reading them, does to held-out sentences: see
    `speak`.
    """
    t3 = models.build_t3()
    t3.load_state_dict(run.load("t3"))
    t3.to(run.device).eval()
    examples = load_examples(corpus, run, t3.hp)
    _, held_out = split_rows(corpus)
    masses = measure_heads(t3, examples, held_out[:MEASURED])
    heads = best_heads(masses)
    (run.folder / "align.json").write_text(json.dumps({"analyzer_heads": heads}) + "\n")
    for (layer, head), mass in sorted(masses.items()):
        run.log("align", layer * t3.cfg.num_attention_heads + head, layer=layer, head=head, walk_mass=mass)
    figures = {f"walk_mass_{i}": masses[head] for i, head in enumerate(heads)}
    return figures | speak(t3, examples, held_out[:SPOKEN], heads, run.seed)


@torch.no_grad()
def speak(t3: T3, examples: Examples, rows: np.ndarray, heads: list[tuple[int, int]], seed: int) -> dict[str, float]:
    """Let T3 speak some sentences through upstream's loop, without its analyzer and with it.

    `eos`: share that ended by themselves; `tokens_ratio`: tokens spoken to tokens of the recording, on
    average; `repeats`: share with two equal tokens in a row, which the analyzer takes for a loop;
    `analyzer_ratio`: tokens spoken with the analyzer to tokens spoken without; `analyzer_cut`: share that
    came out shorter than 3/4 of it.
    """
    rng = np.random.default_rng(seed)
    ended, against_real, repeated, against_free = [], [], [], []
    with analyzer_reads(heads), quiet():
        for row in rows:
            batch = examples.batch(np.array([row]), rng)
            free = generate(t3, batch, seed, analyzer=False)
            guarded = generate(t3, batch, seed, analyzer=True)
            ended.append(bool(free[-1] == t3.hp.stop_speech_token))
            against_real.append(len(free) / (len(batch.speech[0]) + 1))
            repeated.append(bool((free[1:] == free[:-1]).any()))
            against_free.append(len(guarded) / len(free))
    return {
        "eos": float(np.mean(ended)),
        "tokens_ratio": float(np.mean(against_real)),
        "repeats": float(np.mean(repeated)),
        "analyzer_ratio": float(np.mean(against_free)),
        "analyzer_cut": float(np.mean([ratio < 0.75 for ratio in against_free])),
    }


def generate(t3: T3, batch: Batch, seed: int, analyzer: bool) -> Tensor:
    """Tokens [n] that upstream's loop samples, with `generate()`'s defaults, for a batch of one utterance.

    Each call runs on a copy: the analyzer leaves its hooks and eager attention behind in the model it has
    read.
    """
    speaker = copy.deepcopy(t3)
    speaker.hp.multilingual = analyzer
    torch.manual_seed(seed)
    tokens = speaker.inference(
        t3_cond=T3Cond(
            speaker_emb=batch.speaker,
            cond_prompt_speech_tokens=batch.prompt,
            emotion_adv=torch.full((1, 1, 1), EMOTION, device=t3.device),
        ),
        text_tokens=batch.text.repeat(2, 1),
        max_new_tokens=MAX_TOKENS,
        temperature=0.8,
        cfg_weight=0.5,
        repetition_penalty=1.2,
        min_p=0.05,
        top_p=1.0,
    )
    return tokens[0].cpu()


@contextmanager
def analyzer_reads(heads: list[tuple[int, int]]) -> Iterator[None]:
    """Point upstream's analyzer at these (layer, head) pairs for a while."""
    usual = alignment_stream_analyzer.LLAMA_ALIGNED_HEADS
    alignment_stream_analyzer.LLAMA_ALIGNED_HEADS = heads
    try:
        yield
    finally:
        alignment_stream_analyzer.LLAMA_ALIGNED_HEADS = usual


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar and the warnings that upstream prints for every utterance."""
    bar, log = upstream.tqdm, alignment_stream_analyzer.logger
    upstream.tqdm = partial(bar, disable=True)
    log.disabled = True
    try:
        yield
    finally:
        upstream.tqdm = bar
        log.disabled = False
