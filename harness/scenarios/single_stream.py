"""One utterance after the other: how long does somebody wait?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.scenarios.base import Scenario, Turn
from harness.workload import SINGLE_STREAM, Item


class SingleStream(Scenario):
    """A call speaks one utterance; a turn is one utterance by each variant."""

    name = SINGLE_STREAM

    def turns(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        first = next(iter(shares.values()))
        return [{variant: [item] for variant in shares} for item in first]
