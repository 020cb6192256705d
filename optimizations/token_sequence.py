"""Split a long text at its sentence ends, speak the pieces as one batch, and join them without a seam."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from harness.errors import UserError
from harness.pipeline import Pipeline, Segment
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.t3.decoder import decoder_of

CHARACTERS_PER_TOKEN = 0.6
"""English speech runs at about 15 characters a second, speech tokens at 25: only used to size segments."""
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
CLAUSE_END = re.compile(r"(?<=[,;:])\s+")


@register
class TokenSequence(Optimization):
    """Sentences of one text decoded side by side.

    Baseline: one text, one sequence: a passage of n tokens takes n steps that each read all weights, and attention
    whose cost grows with n².

    This: the text is split at sentence ends (then clauses, then words, if a sentence alone is too long), its segments
    are decoded as a batch, so that one reading of the weights serves them all, and the waves are joined with a short
    cross-fade. Texts shorter than the target stay whole. (`batching` has the flow and the vocoder take them as a batch,
    too; where it is on, its size is the decoder's.)

    Where it cannot help: a text of one sentence. It changes what is said: a segment does not hear the one before, so
    intonation starts anew at each seam; WER and similarity judge it.

    Campaign: "27 % faster generation", "74 % attention memory savings"; it compared texts of different lengths, and
    its splitting, which spoke segments one after the other, measured 15.6 % slower.

    Evidence: segments per text, batch sizes decoded, and attention scores saved, counted exactly from the tokens.
    """

    name = "token_sequence"
    lossless = False

    @dataclass
    class Config:
        """`target_tokens`: fill segments up to this; `max_tokens`: no segment above it; `batch_size`: side by side."""

        target_tokens: int = number(100, least=1)
        max_tokens: int = number(400, least=1)
        batch_size: int = number(8, least=1)
        crossfade_ms: float = number(10.0, least=0)

        def __post_init__(self) -> None:
            if self.target_tokens > self.max_tokens:
                raise UserError(
                    f"optimizations.token_sequence: target_tokens={self.target_tokens} must be at most "
                    f"max_tokens={self.max_tokens}"
                )

    def apply(self, pipeline: Pipeline) -> None:
        config = self.config
        self._segments: Counter[int] = Counter()
        self._scores_whole = self._scores_split = 0
        self._decoder = decoder_of(pipeline, self.name)
        self._pipeline = pipeline
        pipeline.swap(self._decoder, "batch_size", config.batch_size)
        pipeline.swap(self._decoder, "observers", [*self._decoder.observers, self._count_scores])
        pipeline.replace_stage("split_text", self._split, by=self.name)
        pipeline.replace_stage("join", self._join, by=self.name)
        self._overlap = int(pipeline.model.sr * config.crossfade_ms / 1000)

    def _split(self, text: str) -> list[str]:
        segments = split_text(text, self.config.target_tokens, self.config.max_tokens)
        self._segments[len(segments)] += 1
        return segments

    def _join(self, waves: list[Tensor]) -> Tensor:
        return crossfade(waves, self._overlap)

    def _count_scores(self, segments: Sequence[Segment], prompts: list[int], tokens: list[Tensor]) -> None:
        """Attention scores per head and layer: as decoded, and as one sequence per text would have had."""
        decoded = list(zip(segments, prompts, tokens, strict=True))
        for _, group in groupby(decoded, key=lambda item: item[0].utterance):
            pieces = list(group)
            text = " ".join(segment.text for segment, _, _ in pieces)
            n_tokens = sum(len(t) for _, _, t in pieces)
            first, first_prompt, _ = pieces[0]
            voice = first_prompt - self._n_text(first.text)
            self._scores_whole += causal_scores(voice + self._n_text(text) + n_tokens)
            self._scores_split += sum(causal_scores(prompt + len(t)) for _, prompt, t in pieces)

    def _n_text(self, text: str) -> int:
        return self._pipeline.text_tokens(text).shape[1]

    def evidence(self, pipeline: Pipeline) -> Evidence:
        batches = Counter(self._decoder.batches)
        facts = {
            "texts_by_segments": {str(n): count for n, count in sorted(self._segments.items())},
            "batches_by_size": {str(n): count for n, count in sorted(batches.items())},
            "attention_scores_whole": self._scores_whole,
            "attention_scores_split": self._scores_split,
        }
        if self._scores_whole:
            facts["attention_scores_saved_percent"] = round(100 * (1 - self._scores_split / self._scores_whole), 2)
        if not any(n > 1 for n in self._segments):
            return Evidence(False, facts, "no text of this workload is long enough to be split")
        return Evidence(True, facts)


def split_text(text: str, target: int, maximum: int) -> list[str]:
    """Pieces of about `target` speech tokens, none expected above `maximum`; joined by spaces they are the text.

    >>> split_text("It rains. Take a coat with you. Goodbye!", target=20, maximum=40)
    ['It rains.', 'Take a coat with you.', 'Goodbye!']
    """
    sentences = [s for s in SENTENCE_END.split(text.strip()) if s]
    pieces = [piece for sentence in sentences for piece in _shorten(sentence, maximum)]
    return _fill(pieces, target) or [text]


def _expected_tokens(text: str) -> float:
    return len(text) / CHARACTERS_PER_TOKEN


def _shorten(sentence: str, maximum: int) -> list[str]:
    """A sentence whole, or its clauses, or its words, filled up to the maximum."""
    if _expected_tokens(sentence) <= maximum:
        return [sentence]
    clauses = CLAUSE_END.split(sentence)
    words = [w for clause in clauses for w in ([clause] if _expected_tokens(clause) <= maximum else clause.split())]
    return _fill(words, maximum)


def _fill(pieces: list[str], limit: int) -> list[str]:
    """Neighbours put together as long as they stay within the limit."""
    filled: list[str] = []
    for piece in pieces:
        if filled and _expected_tokens(f"{filled[-1]} {piece}") <= limit:
            filled[-1] = f"{filled[-1]} {piece}"
        else:
            filled.append(piece)
    return filled


def crossfade(waves: list[Tensor], overlap: int) -> Tensor:
    """Join waves [n], each faded over its `overlap` last samples into the next one's first."""
    joined = waves[0]
    for wave in waves[1:]:
        n = min(overlap, len(joined), len(wave))
        rise = 0.5 - 0.5 * torch.cos(torch.linspace(0, math.pi, n, device=wave.device))
        seam = joined[len(joined) - n :] * (1 - rise) + wave[:n] * rise
        joined = torch.cat((joined[: len(joined) - n], seam, wave[n:]))
    return joined


def causal_scores(length: int) -> int:
    """Elements below and on the diagonal of a causal attention matrix."""
    return length * (length + 1) // 2
