"""Where files lie that are not code: beside the packages in a checkout, inside one where the harness is installed.

And how files are called in what is kept of a run, where this machine's folders mean nothing.
"""

import os
import re
import sys
import traceback
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""Below it lie `configs`, and the files that they name."""
CONFIGS = ROOT / "configs"
"""Every setting's default, one folder per group, and the campaign's claims."""
HELD_OUT = ROOT / "tests/data/held_out_sentences.txt"
"""Sentences that the miniature never heard in its training, a line each."""


def without_folders(text: str) -> str:
    """The text with its files named as on any machine: a package's from its `site-packages` on, this project's from its
    root on, and the user's own from `~` on."""
    text = _beginning((*sys.path, str(_PACKAGE.parent))).sub("", text)
    return _beginning((os.path.expanduser("~"),)).sub("~/", text)


def trace() -> str:
    """The traceback of the error that is being handled, without this machine's folders."""
    return without_folders(traceback.format_exc())


@cache
def _beginning(folders: tuple[str, ...]) -> re.Pattern[str]:
    """What paths below any of the folders begin with; of folders within others the inner ones come first."""
    inner_first = sorted({str(folder).rstrip("/") for folder in folders} - {""}, key=len, reverse=True)
    return re.compile(rf"(?<![\w./~-])(?:{'|'.join(map(re.escape, inner_first)) or '(?!)'})/")
