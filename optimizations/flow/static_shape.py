"""The flow in shapes that stay: rows padded to whole buckets, and what is padded changes nothing.

Upstream's flow nearly bears padding already: attention is masked, the estimator multiplies by its mask around every
convolution, and its convolutions look back only. Four things are missing, and done here:

- behind a row's end the encoder's first layer leaves a bias, which the next one, looking three tokens ahead, would
  see; it is zeroed, as it is for a row alone;
- upstream asks the device whether a row of the mask is empty, 14 times in each step of the solver, which nothing that
  is captured may do; no row is empty, so nobody asks;
- upstream also asks how long the rows are, behind the encoder too, and the device idles while the host gets ready what
  follows; of one row the host knows it (`Unasked`);
- a mask keeps a GPU from its flash kernels. Packed attention says the same thing in another way: all rows lie in one
  sequence of frames, cut into pieces that see only themselves, and a row's padding is a piece of its own.

The solver's steps are one and the same function of buffers (the mel, the time, the time that passes), so one of them is
captured and runs as often as there are steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimizations.common.graphs import Graphs
from optimizations.common.memory import Reused
from optimizations.common.padding import padded_length, within
from optimizations.flow.estimator import ChannelsLastEstimator
from optimizations.flow.layer_steps import LayerSteps, Steps

STAGE = "tokens_to_mel"
FRAMES_PER_TOKEN = 2
"""Of the mel."""
OWN_WAY = "encode_rows"
"""An encoder's attribute that stands for `encode`, where it has one."""


class Unasked:
    """`CausalMaskedDiffWithXvec.inference` of one whole row, asking the device for nothing; others are upstream's."""

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        self._upstream: Callable[..., tuple[Tensor, None]] = flow.inference

    @torch.inference_mode()
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor | None,
        prompt_feat: Tensor,
        prompt_feat_len: Tensor | None,
        embedding: Tensor,
        finalize: bool,
        n_timesteps: int = 10,
        noised_mels: Tensor | None = None,
        meanflow: bool = False,
    ) -> tuple[Tensor, None]:
        """Speech tokens [1, n], and a voice's tokens [1, p], mel [1, 2 p, 80] and speaker [1, 192] -> mel [1, 80, 2 n].

        The lengths are those of the tensors, whatever `token_len` and the others say of one row.
        """
        flow = self.flow
        if len(token) > 1 or not finalize:
            return self._upstream(
                *(token, token_len, prompt_token, prompt_token_len, prompt_feat, prompt_feat_len, embedding, finalize),
                *(n_timesteps, noised_mels, meanflow),
            )
        ids = torch.cat((prompt_token.view(1, -1).long(), token.long()), dim=1)
        lengths = torch.full((1,), ids.shape[1], device=ids.device)
        hidden, _ = flow.encoder(flow.input_embedding(ids), lengths)
        mu = flow.encoder_proj(hidden).transpose(1, 2).contiguous()
        known, prompt = torch.zeros_like(mu), prompt_feat.view(-1, mu.shape[1])
        known[0, :, : len(prompt)] = prompt.T
        mel, _ = flow.decoder(
            mu=mu,
            mask=mu.new_ones(1, 1, mu.shape[2]),
            spks=flow.spk_embed_affine_layer(F.normalize(torch.atleast_2d(embedding), dim=1)),
            cond=known,
            n_timesteps=n_timesteps,
            noised_mels=noised_mels,
            meanflow=meanflow,
        )
        return mel[:, :, len(prompt) :], None


class StaticEncoder:
    """`UpsampleConformerEncoder.forward` for rows of any length, padded to multiples of `bucket` tokens."""

    def __init__(self, encoder: Any, graphs: Graphs, bucket: int) -> None:
        self.encoder, self.graphs, self.bucket = encoder, graphs, bucket
        self._inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._memory = Reused(next(encoder.parameters()).device)

    @torch.inference_mode()
    def forward(self, xs: Tensor, xs_lens: Tensor, *_chunks: int) -> tuple[Tensor, Tensor]:
        """Embedded tokens [B, n, C] and lengths [B] -> hidden [B, 2 n, C] and mask [B, 1, 2 n], as upstream's."""
        n, longest = xs.shape[1], padded_length(xs.shape[1], self.bucket)
        inputs, lengths = self._buffers(xs, longest)
        inputs.copy_(F.pad(xs, (0, 0, 0, longest - n)))
        lengths.copy_(xs_lens)
        shape = ("encoder", *inputs.shape)
        hidden = self.graphs.run(STAGE, shape, lambda: encode(self.encoder, inputs, lengths))
        ratio = self.encoder.up_layer.stride
        return hidden[:, : ratio * n].clone(), within(ratio * lengths, ratio * n)[:, None]

    def _buffers(self, xs: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        key = len(xs), longest
        if key not in self._inputs:
            inputs = self._memory.take((len(xs), longest, xs.shape[2]), xs.dtype)
            self._inputs[key] = inputs, torch.zeros(len(xs), dtype=torch.long, device=xs.device)
        return self._inputs[key]


def encode(encoder: Any, embedded: Tensor, lengths: Tensor) -> Tensor:
    """Embedded tokens [B, n, C], zero behind each row's length -> hidden [B, 2 n, C], each row as if it were alone.

    An encoder that was given a way of its own to do this goes that way.
    """
    if own := vars(encoder).get(OWN_WAY):
        hidden: Tensor = own(embedded, lengths)
        return hidden
    mask = within(lengths, embedded.shape[1])[:, None]
    x, positions, _ = encoder.embed(embedded, mask)
    x = encoder.pre_lookahead_layer(x * mask.transpose(1, 2))
    x = encoder.forward_layers(x, mask, positions, mask)
    x, lengths = encoder.up_layer(x.transpose(1, 2).contiguous(), lengths)
    x = x.transpose(1, 2).contiguous()
    mask = within(lengths, x.shape[1])[:, None]
    x, positions, _ = encoder.up_embed(x, mask)
    x = encoder.forward_up_layers(x, mask, positions, mask)
    return encoder.after_norm(x) if encoder.normalize_before else x


class StaticSolver:
    """`CausalConditionalCFM.forward`, with rows padded to multiples of `bucket` frames and one captured step."""

    def __init__(self, cfm: Any, graphs: Graphs, bucket: int) -> None:
        self.cfm, self.graphs, self.bucket = cfm, graphs, bucket
        self._upstream: Callable[..., tuple[Tensor, None]] = cfm.forward
        self._times: dict[tuple[int, bool, torch.dtype], Tensor] = {}
        self._steps: dict[tuple[int, int, int], tuple[ChannelsLastEstimator | None, Steps]] = {}
        self._memory = Reused(next(cfm.estimator.parameters()).device)

    @torch.inference_mode()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        noised_mels: Tensor | None = None,
        meanflow: bool = False,
    ) -> tuple[Tensor, None]:
        """Upstream's arguments, random numbers and result: a mel [B, 80, T]."""
        if spks is None or cond is None:
            return self._upstream(mu, mask, n_timesteps, temperature, spks, cond, noised_mels, meanflow)
        noise = torch.randn_like(mu)
        if noised_mels is not None:
            noise[..., mu.shape[2] - noised_mels.shape[2] :] = noised_mels
        sides, rate = 1 if meanflow else 2, self.cfm.inference_cfg_rate
        steps = self._steps_for(mu, spks, sides)
        steps.begin(noise, mask, mu, spks, cond, self._schedule(n_timesteps, meanflow, mu))
        shape = "step", sides, *steps.x.shape
        for index in range(1 if self.graphs.is_preparing else n_timesteps):
            steps.come_to(index)
            self.graphs.run(STAGE, shape, lambda: steps.step(rate))
        return steps.x[:, :, : mu.shape[2]].to(mu.dtype, copy=True), None

    def _schedule(self, n_timesteps: int, meanflow: bool, like: Tensor) -> Tensor:
        """The times of the steps [n + 1], the same tensor each time."""
        key = n_timesteps, meanflow, like.dtype
        if key not in self._times:
            times = torch.linspace(0, 1, n_timesteps + 1, device=like.device, dtype=like.dtype)
            if self.cfm.t_scheduler == "cosine" and not meanflow:
                times = 1 - torch.cos(times * 0.5 * torch.pi)
            self._times[key] = times
        return self._times[key]

    def _steps_for(self, mu: Tensor, speaker: Tensor, sides: int) -> Steps:
        """The estimator's own way through the steps where it has one, else that through its layers."""
        rows, n_mels, length = mu.shape
        key = rows, sides, padded_length(length, self.bucket)
        estimator = self.cfm.estimator
        bound = getattr(estimator.forward, "__self__", None)
        flat = bound if isinstance(bound, ChannelsLastEstimator) else None
        if key not in self._steps or self._steps[key][0] is not flat:
            steps = flat.solver_steps(*key, self._memory) if flat else None
            self._steps[key] = (
                flat,
                steps or LayerSteps.blank(estimator, rows, sides, n_mels, speaker.shape[1], key[2], self._memory),
            )
        return self._steps[key][1]
