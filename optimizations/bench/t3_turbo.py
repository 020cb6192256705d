"""`t3.py` for Turbo's GPT-2."""

from __future__ import annotations

from optimizations.bench import t3


def main() -> None:
    t3.main(t3.TURBO)
