"""Upstream's alignment guard, fed with three attention rows instead of three attention matrices.

The multilingual model watches three attention heads that follow the text, to suppress an early stop and to force one
when the voice rambles. Upstream gets at those heads by switching the whole model to eager attention, for good, and by
adding three forward hooks per call that nobody removes. All that its decisions need is the newest position's softmax
row of each head over the text, a few hundred numbers; the decisions themselves are upstream's own code.
"""

from __future__ import annotations

import torch
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer
from torch import Tensor, nn

DECISIONS = {2.0**15: "forced", -(2.0**15): "suppressed"}
"""Upstream marks what it did by the stop token's logit."""


class Guard(AlignmentStreamAnalyzer):
    """Upstream's analyzer without its hooks: the caller hands it the rows."""

    def __init__(self, n_text: int, stop_token: int) -> None:
        super().__init__(None, None, text_tokens_slice=(0, n_text), eos_idx=stop_token)
        self.decision = "pass"

    def _add_attention_spy(self, tfmr: nn.Module, buffer_idx: int, layer_idx: int, head_idx: int) -> None:
        """Nothing to spy on."""

    def judge(self, rows: Tensor, logits: Tensor, last_token: int) -> Tensor:
        """Logits [1, V] after the guard's decision.

        Args:
            rows: the watched heads' attention over the text, [heads, n, n_text] on the CPU, n being the number of
                new positions: two after the prompt (upstream starts with two start tokens), then one.
        """
        _, n_text = self.text_tokens_slice
        if self.curr_frame_pos == 0:
            # Upstream cuts the first matrix at the end of the text: give it rows of that shape.
            rows = torch.cat((rows.new_zeros(rows.shape[0], n_text, n_text), rows), dim=1)
        self.last_aligned_attns = list(rows)
        judged = self.step(logits, next_token=last_token)
        self.decision = DECISIONS.get(judged[0, self.eos_idx].item(), "pass")
        return judged
