"""HiFT over rows of different length, each as it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimizations.vocoder.static_shape import OWN_WAY

SAMPLES_PER_FRAME = 480
HIFT_ROWS = 8
"""Mels that are decoded at once: 10 s of one are some 0.2 GB on the way, and a few of them fill a GPU."""
HIFT_REACH = 16
"""Mel frames that a sample of HiFT's wave can depend on, to either side: 3 through its first convolution, 1 through
the first upsampling, 7.5 through the residual blocks at 8 steps a frame (kernel 11, dilations 1, 3, 5), and less than
3 through everything finer."""


def source(hift: Any, mel: Tensor) -> Tensor:
    """HiFT's excitation [1, 1, 480 n] of one mel [1, 80, n], with its own random phases and noise.

    Row by row, for it costs little, and phases add up over a row's whole length: a rounding error of the pitch, as
    another batch size brings it, would be heard as another phase at the end. A vocoder that was given a way of its own
    to do this goes that way.
    """
    if own := vars(hift).get(OWN_WAY):
        made: Tensor = own(mel)
        return made
    pitch = hift.f0_upsamp(hift.f0_predictor(mel)[:, None]).transpose(1, 2)
    excitation, _, _ = hift.m_source(pitch)
    return excitation.transpose(1, 2)


def decode(hift: Callable[..., Tensor], mels: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """Waves [480 n] of mels [1, 80, n] and sources [1, 1, 480 n]; `hift` decodes equally long ones, in a batch."""
    frames = [mel.shape[2] for mel in mels]
    tail = 2 * HIFT_REACH
    if len(set(frames)) == 1:
        return list(hift(x=torch.cat(mels), s=torch.cat(sources)))
    if min(frames) <= tail:
        return [hift(x=mel, s=excitation)[0] for mel, excitation in zip(mels, sources, strict=True)]
    whole = hift(x=_padded(mels), s=_padded(sources))
    ends = hift(
        x=torch.cat([mel[..., -tail:] for mel in mels]),
        s=torch.cat([excitation[..., -tail * SAMPLES_PER_FRAME :] for excitation in sources]),
    )
    safe = HIFT_REACH * SAMPLES_PER_FRAME
    return [
        torch.cat((wave[: n * SAMPLES_PER_FRAME - safe], end[-safe:]))
        for wave, end, n in zip(whole, ends, frames, strict=True)
    ]


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows [1, C, n] -> [B, C, longest], zeros behind their ends."""
    longest = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, longest - row.shape[2])) for row in rows])
