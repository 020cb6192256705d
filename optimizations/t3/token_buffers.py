"""What one token's step leaves on the device for the next one's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenBuffers:
    """For B rows, at most `limit` tokens, V ids, and embeddings C wide."""

    token: Tensor  # [B, 1]: the newest
    tokens: Tensor  # [B, limit]: all of them
    written: Tensor  # [1]: how many
    embeds: Tensor  # [sides of B, 1, C]: the newest one's embedding; two sides with guidance, else one
    seen: Tensor  # [B, V]: ids that a row has produced
    held: Tensor  # [V]: ids that must not win: those beyond speech, where the length is pinned
    finished: Tensor  # [B, 1]

    @classmethod
    def blank(cls, rows: int, sides: int, limit: int, token_table: Tensor, n_ids: int) -> TokenBuffers:
        """Buffers before the first token; `token_table` [.., C] gives the embeddings' width, dtype and device."""
        device = token_table.device
        return cls(
            token=torch.zeros(rows, 1, dtype=torch.long, device=device),
            tokens=torch.zeros(rows, limit, dtype=torch.long, device=device),
            written=torch.zeros(1, dtype=torch.long, device=device),
            embeds=token_table.new_zeros(sides * rows, 1, token_table.shape[1]),
            seen=torch.zeros(rows, n_ids, dtype=torch.bool, device=device),
            held=torch.zeros(n_ids, dtype=torch.bool, device=device),
            finished=torch.zeros(rows, 1, dtype=torch.bool, device=device),
        )
