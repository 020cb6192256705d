"""What became of the words of one clip: how many went wrong, and which of them at its end.

A synthesizer has two faults of its own: it goes on after the text is over, with repeats and babble (a tail), or it
stops before (an early end). Both are counted apart from words that were said wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jiwer

from harness.quality.normalizer import normalize


def word_errors(text: str, heard: str, language: str = "en") -> dict[str, Any]:
    """Columns of a score: both sides as they came and as they are compared, the error rates and their counts.

    In a language without spaces words are characters, in all of these.
    """
    reference, hypothesis = normalize(text, language), normalize(heard, language)
    errors = jiwer.process_words(reference, hypothesis)
    said, meant = hypothesis.split(), reference.split()
    return {
        "text": text,
        "heard": heard,
        "reference": reference,
        "hypothesis": hypothesis,
        "wer": errors.wer,
        "cer": jiwer.process_characters("".join(meant), "".join(said)).cer,
        "hits": errors.hits,
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
        "tail_insertions": surplus(said, meant),
        "tail_deletions": surplus(meant, said),
    }


def surplus(words: Sequence[str], others: Sequence[str]) -> int:
    """How many words can be cut off the end with one error less for each: what the other side has no counterpart for.

    Defined by the number of errors, so that it does not depend on which of several equal alignments is drawn.
    """
    errors, n = distance(words, others), 0
    while n < len(words) and distance(words[: len(words) - n - 1], others) == errors - n - 1:
        n += 1
    return n


def distance(words: Sequence[str], others: Sequence[str]) -> int:
    """The least number of substitutions, deletions and insertions that turn one into the other."""
    errors = jiwer.process_words(" ".join(others), " ".join(words))
    return errors.substitutions + errors.deletions + errors.insertions
