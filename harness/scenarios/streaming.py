"""One utterance after the other, in chunks as they are ready: how long until the first sound, and does it go on?

What a chunk is worth is told by when the parent has it: its samples come through the pipe, and the parent's clock is
read when the last of them is there. A pipeline that cannot stream gives one chunk, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.results import Measurement
from harness.scenarios.base import Call, Figure, Heard, Scenario, Turn
from harness.workload import STREAMING, Item

IN_PIECES = "what came in chunks is not the utterance"


def first_audio_s(rows: Sequence[Measurement]) -> float:
    """Seconds until the first chunks of a call's rows were there; one that has none has waited for all of it."""
    return sum(row.chunks[0][0] if row.chunks else row.time_s or 0.0 for row in rows)


class Streaming(Scenario):
    """A call speaks one utterance; a turn is one utterance by each variant."""

    name = STREAMING
    method = "stream"
    compared = (*Scenario.compared, Figure("first_audio_s", first_audio_s))

    def turns(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        first = next(iter(shares.values()))
        return [{variant: [item] for variant in shares} for item in first]

    def rows(self, call: Call, heard: Heard) -> list[Measurement]:
        rows = super().rows(call, heard)
        for row, wave, said in zip(rows, heard.waves, heard.said, strict=False):
            row.chunks = [[ready_s, len(samples) / 4 / said.sample_rate] for ready_s, samples in heard.chunks]
            if b"".join(samples for _, samples in heard.chunks) != wave.tobytes():
                row.flaw = row.flaw or IN_PIECES
        return rows

    def remark(self, shares: Mapping[str, Sequence[Item]]) -> str:
        return (
            "streaming: utterances come in chunks, whose time is that at which the parent had them; RTF and generation "
            "time go to the last one. Quality is that of the chunks put together."
        )
