"""Text as it is compared, the same function on both sides: what the text says and what was heard.

English goes through Whisper's own normalizer (`harness.quality.english`), which writes numbers, titles and contractions
in one way. Every other language goes through its basic one, which lowers case and drops punctuation. In languages
written without spaces every character is a word, as in Whisper's own evaluation, so that the word error rate there is
the character error rate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from harness.quality.english import english

APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`´", "'"))
WITHOUT_SPACES = frozenset({"bo", "ja", "km", "lo", "my", "th", "yue", "zh"})


def normalize(text: str, language: str = "en") -> str:
    """Words in lower case with single spaces between them; empty if there is no word in the text.

    `language` is a code such as en, fr or zh-CN. The first call imports transformers.

    >>> normalize("“Don’t — stop!” Dr. Smith said to all 21 of the well-known dogs' owners.")
    'do not stop doctor smith said to all 21 of the well known dogs owners'
    """
    code = primary(language)
    text = text.translate(APOSTROPHES)
    words = english()(unicodedata.normalize("NFC", text)) if code == "en" else ""
    if not words:  # of fillers, which English leaves out, too
        words = _basic(code in WITHOUT_SPACES)(re.sub(r"[()]", " ", text))  # what stands in parentheses is spoken
    return words


def primary(language: str) -> str:
    """A language's code without its region: zh-CN is zh."""
    return re.split("[-_]", language.lower())[0]


@cache
def _basic(split: bool) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    basic = BasicTextNormalizer(split_letters=split)
    basic.clean = _only_words
    return lambda text: " ".join(basic(text).split())


def _only_words(s: str) -> str:
    """Without symbols and punctuation.

    Whisper's own takes marks away, too, and with them the vowels of Hindi and Thai.
    """
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in unicodedata.normalize("NFKC", s))
