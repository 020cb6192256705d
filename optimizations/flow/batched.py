"""The flow over rows of different length, each as it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from optimizations.common.padding import within
from optimizations.flow.prefix import Prompt
from optimizations.flow.static_shape import encode

SOLVER_ROWS = 16
"""Utterances that are solved at once: with guidance 32 rows, which fill a GPU. On an H200 a step of 1,024 frames takes
2.07 ms an utterance for 8 of them, 1.74 for 16 and for 32, and 32 take 0.8 GB more."""
ENCODER_ROWS = 8
"""Rows that the flow's encoder takes at once. Upstream's relative positions take matrices of frames by frames for each
head, some 0.3 GB for 20 s of prompt and speech; a few rows keep a GPU busy, and more would only take more memory."""


def encode_few(encoder: Any, embedded: Tensor, lengths: Tensor) -> Tensor:
    """`encode`, a few rows at a time."""
    groups = zip(embedded.split(ENCODER_ROWS), lengths.split(ENCODER_ROWS), strict=True)
    return torch.cat([encode(encoder, rows, own) for rows, own in groups])


def solve(
    flow: Any,
    ids: list[Tensor],
    prompts: list[Prompt],
    noises: list[Tensor],
    n_steps: int,
    encode_rows: Callable[[Any, Tensor, Tensor], Tensor] = encode_few,
) -> Tensor:
    """What `CausalMaskedDiffWithXvec.inference` computes, for rows of different length.

    Args:
        flow: upstream's flow.
        ids: prompt and speech tokens [n] of each row.
        prompts: each row's voice.
        noises: what each row starts from [80, 2 n].
        n_steps: Euler steps.
        encode_rows: `encode`, or what stands for it.

    Returns:
        mels [B, 80, longest], prompt included; what is behind a row's end means nothing.
    """
    lengths = torch.tensor([len(row) for row in ids], device=ids[0].device)
    padded = pad_sequence(ids, batch_first=True)
    valid = within(lengths, padded.shape[1])
    embedded = flow.input_embedding(padded) * valid[..., None]
    hidden = encode_rows(flow.encoder, embedded, lengths)
    mu = flow.encoder_proj(hidden).transpose(1, 2).contiguous()
    mask = within(flow.token_mel_ratio * lengths, mu.shape[2])[:, None].to(mu.dtype)
    known = torch.zeros_like(mu)
    noise = torch.zeros_like(mu)
    for row, (prompt, start) in enumerate(zip(prompts, noises, strict=True)):
        known[row, :, : len(prompt.mel)] = prompt.mel.T
        noise[row, :, : start.shape[1]] = start
    speakers = F.normalize(torch.stack([prompt.speaker for prompt in prompts]), dim=1)
    mel, _ = flow.decoder(
        meanflow=flow.decoder.estimator.meanflow,
        mu=mu,
        mask=mask,
        spks=flow.spk_embed_affine_layer(speakers),
        cond=known,
        n_timesteps=n_steps,
        noised_mels=noise,  # as long as `mu`, so that nothing is left of the decoder's own draw
    )
    return mel
