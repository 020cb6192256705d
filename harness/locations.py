"""Where files lie that are not code: beside the packages in a checkout, inside one where the harness is installed."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "configs"
CONFIGS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"
"""Every setting's default, one folder per group, and the campaign's claims."""
