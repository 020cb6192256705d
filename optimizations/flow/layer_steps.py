"""The solver's steps through the estimator's layers, in shapes that stay; and what any way through them is like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen import decoder as estimator_module
from diffusers.models.attention_processor import Attention
from torch import Tensor

from optimizations.common.memory import Reused
from optimizations.common.modules import queries_keys_values

HALF = (torch.float16, torch.bfloat16)


class Steps(Protocol):
    """B rows of up to T frames on their way from noise to mel, on one side or, with guidance, on two."""

    x: Tensor
    """The mel on its way [B, 80, T]."""

    def begin(self, noise: Tensor, mask: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor, times: Tensor) -> None:
        """Take rows of n frames, for steps between the times [steps + 1]: noise, mu and prompt [B, 80, n], mask
        [B, 1, n], speaker [B, 80]."""
        ...

    def come_to(self, index: int) -> None:
        """The step with that number is the next one."""
        ...

    def step(self, rate: float) -> None:
        """One Euler step, guided at that rate where there are two sides; it can be captured."""
        ...


@dataclass
class LayerSteps:
    """What a step through the layers of a `CausalConditionalCFM`'s estimator reads and writes."""

    estimator: Any
    attention: RowAttention
    x: Tensor  # [B, 80, T]: the mel on its way from noise
    time: Tensor  # [1]
    until: Tensor  # [1]: the next step's time
    mask: Tensor  # [sides B, 1, T]: 1 within a row
    mu: Tensor  # [sides B, 80, T]: the encoder's mel; zero on the unguided side, like the next two
    speaker: Tensor  # [sides B, 80]
    prompt: Tensor  # [sides B, 80, T]
    visible: Tensor  # [sides B, 1, T]: the mask as truth values
    bounds: Tensor  # [2 sides B + 1]: where the pieces of packed attention begin and end
    times: Tensor  # [steps + 1]

    @classmethod
    def blank(
        cls, estimator: Any, rows: int, sides: int, n_mels: int, n_speaker: int, frames: int, memory: Reused
    ) -> LayerSteps:
        """What is large of it lies in `memory`: rows are taken and gone through one lot at a time."""
        total, like = sides * rows, next(estimator.parameters()).new_zeros(0, dtype=estimator.dtype)
        mels = memory.take((rows + 2 * total, n_mels, frames), like.dtype).split([rows, total, total])
        return cls(
            estimator=estimator,
            attention=RowAttention(),
            x=mels[0],
            time=like.new_zeros(1),
            until=like.new_zeros(1),
            mask=like.new_zeros(total, 1, frames),
            mu=mels[1],
            speaker=like.new_zeros(total, n_speaker),
            prompt=mels[2],
            visible=torch.zeros(total, 1, frames, dtype=torch.bool, device=like.device),
            bounds=torch.zeros(2 * total + 1, dtype=torch.int32, device=like.device),
            times=like,
        )

    def begin(self, noise: Tensor, mask: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor, times: Tensor) -> None:
        rows, _, frames = self.x.shape
        total, behind = len(self.mask), (0, frames - mu.shape[2])
        self.x.copy_(F.pad(noise, behind))
        self.mask.copy_(F.pad(mask, behind).repeat(total // rows, 1, 1))
        self.mu[:rows] = F.pad(mu, behind)
        self.speaker[:rows] = speaker
        self.prompt[:rows] = F.pad(prompt, behind)
        self.mu[rows:] = 0
        self.prompt[rows:] = 0
        self.visible.copy_(self.mask)
        starts = frames * torch.arange(total, device=mu.device)
        ends = starts + self.visible[:, 0].sum(dim=1)
        self.bounds[:-1] = torch.stack((starts, ends), dim=1).flatten()
        self.bounds[-1] = total * frames
        self.times = times

    def come_to(self, index: int) -> None:
        self.time.copy_(self.times[index : index + 1])
        self.until.copy_(self.times[index + 1 : index + 2])

    def step(self, rate: float) -> None:
        """With guidance, or by a flow that does without and knows where it ends."""
        total, guided = len(self.mask), len(self.mask) > len(self.x)
        with self._without_questions():
            velocity = self.estimator.forward(
                x=self.x.repeat(total // len(self.x), 1, 1),
                mask=self.mask,
                mu=self.mu,
                t=self.time.expand(total),
                spks=self.speaker,
                cond=self.prompt,
                r=None if guided else self.until.expand(total),
            )
        if guided:
            with_text, without = velocity.chunk(2)
            velocity = (1 + rate) * with_text - rate * without
        self.x += (self.until - self.time) * velocity

    @contextmanager
    def _without_questions(self) -> Iterator[None]:
        """The estimator with attention by rows, asking the device for nothing; nothing of it is left behind."""
        attentions = [module for module in self.estimator.modules() if isinstance(module, Attention)]
        processors = [attention.processor for attention in attentions]
        helpers = estimator_module.add_optional_chunk_mask, estimator_module.mask_to_bias
        bounds, visible = self.bounds, self.visible

        def bounds_or_mask(_mask: Tensor, dtype: torch.dtype) -> Tensor:
            return bounds if bounds.is_cuda and dtype in HALF else visible

        estimator_module.add_optional_chunk_mask = lambda _x, mask, *_: mask
        estimator_module.mask_to_bias = bounds_or_mask
        for attention in attentions:
            attention.processor = self.attention  # type: ignore[assignment]
        try:
            yield
        finally:
            estimator_module.add_optional_chunk_mask, estimator_module.mask_to_bias = helpers
            for attention, processor in zip(attentions, processors, strict=True):
                attention.processor = processor


class RowAttention:
    """Self-attention in which every row sees its own frames only, for diffusers' `Attention`."""

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states [R, T, C]; attention_mask is a truth mask [R, 1, T], or the bounds of packed attention."""
        assert attention_mask is not None
        q, k, v = queries_keys_values(attention, hidden_states)
        if attention_mask.dtype == torch.bool:
            q, k, v = [t.transpose(1, 2) for t in (q, k, v)]
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None]).transpose(1, 2)
        else:
            seen = packed_attention(q, k, v, attention_mask)
        return attention.to_out[0](seen.flatten(2))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Flash attention [R, T, heads, D] within pieces of the R * T frames, which `bounds` [pieces + 1] delimits.

    The operator under `torch.nn.attention.varlen`, whose wrapper also clears a state for dropout in each call.
    """
    longest = q.shape[1]
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    seen = torch.ops.aten._flash_attention_forward(
        *packed, bounds, bounds, longest, longest, 0.0, False, return_debug_mask=False
    )[0]
    return seen.view(q.shape)
