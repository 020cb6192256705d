"""All utterances at once: how much can be spoken in a day?

The unmodified pipeline takes them one after the other anyway, so that all of them would only take longer: it speaks a
few, and figures are compared per second of audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import stats
from harness.errors import UserError
from harness.scenarios.base import Scenario, Turn
from harness.workload import OFFLINE, Item


class Offline(Scenario):
    """A call speaks a variant's whole share; a round is one call by each."""

    name = OFFLINE

    def check(self, settings: Mapping[str, Any]) -> None:
        if (few := settings["offline_baseline_items"]) < 1:
            raise UserError(f"measure.offline_baseline_items={few}: the baseline has to speak 1 utterance or more")

    def share(self, items: Sequence[Item], modified: bool, settings: Mapping[str, Any]) -> list[Item]:
        return list(items if modified else items[: settings["offline_baseline_items"]])

    def turns(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        return [{variant: list(items) for variant, items in shares.items()}]

    def own_warmup(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        """A batch has shapes of its own to prepare."""
        return self.turns(shares)

    def least_rounds(self, settings: Mapping[str, Any]) -> int:
        """A batch is one measurement, however many utterances it has, and an interval takes several."""
        return max(settings["min_rounds"], stats.MIN_PAIRS)

    def remark(self, shares: Mapping[str, Sequence[Item]]) -> str:
        sizes = [f"{variant} speaks {len(items)}" for variant, items in shares.items()]
        return (
            f"offline: in one call {' and '.join(sizes)} utterances (measure.offline_baseline_items), the baseline one "
            "after the other. RTF is per second of audio, and each call's time is counted once. Quality is compared on "
            "what both spoke."
        )
