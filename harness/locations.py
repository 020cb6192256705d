"""Where files lie that are not code: beside the packages in a checkout, inside one where the harness is installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""Below it lie `configs`, and the files that they name."""
CONFIGS = ROOT / "configs"
"""Every setting's default, one folder per group, and the campaign's claims."""
HELD_OUT = ROOT / "tests/data/held_out_sentences.txt"
"""Sentences that the miniature never heard in its training, a line each."""
