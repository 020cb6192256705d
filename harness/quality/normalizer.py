"""Text as it is compared for the word error rate, after the conventions of seed-tts-eval.

Lower case, no punctuation but the apostrophe inside a word. Both sides go through the same function. Spelling,
contractions and numbers are left alone: write numbers out, a recognizer does.
"""

import re
import unicodedata

APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`´", "'"))


def normalize(text: str) -> str:
    """Lower-case words with single spaces between them; empty if there is no word.

    >>> normalize("“Don’t — stop!” he said to the well-known dogs' owner.")
    "don't stop he said to the well known dogs owner"
    """
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).lower()
    words = (word.strip("'") for word in re.sub(r"[^\w']|_", " ", text).split())
    return " ".join(word for word in words if word)
