"""The mel of an utterance whose end is not there yet: the flow over a voice's prompt and the tokens so far.

Nothing of a pass can be kept for the next one: encoder and estimator attend to all frames in both directions, the
prompt's included, so each pass makes all frames anew, and those of a shorter prefix differ from those of the whole.
What keeps neighbouring passes close is that a frame starts from the same noise in each of them: on the miniature a step
over a join is no larger than elsewhere then. To give the estimator what was said as it is given the prompt's mel, as
something known, took it further away from the whole utterance's mel.

Upstream's `finalize=False` would leave out the frames of the last three tokens, whose neighbours ahead the encoder's
first layer has not seen; in `chatterbox-tts` 0.1.7 it raises, as its mask keeps the length that the mel has lost. Here
they are made, for they are the best there is to put behind the frames that count; the caller says them again later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from chatterbox.tts import Conditionals
from torch import Tensor

from harness.pipeline import Pipeline
from optimizations.flow.steps import euler_steps

LOOKAHEAD = 3
"""Tokens ahead that the encoder's first layer looks at."""


@dataclass(frozen=True)
class Prompt:
    """What the flow knows of a voice: `tokens` [p], `mel` [2 p, 80] and `speaker` [192]."""

    tokens: Tensor
    mel: Tensor
    speaker: Tensor


def prompt_of(voice: Conditionals, device: torch.device, dtype: torch.dtype) -> Prompt:
    """A voice's prompt without changing it, as upstream's `S3Token2Mel.forward` would."""
    tokens, mel, speaker = (
        torch.as_tensor(voice.gen[key]).to(device) for key in ("prompt_token", "prompt_feat", "embedding")
    )
    return Prompt(tokens.view(-1).long(), mel[0].to(dtype), speaker.view(-1).to(dtype))


def shortened(prompt: Prompt, most: int) -> Prompt:
    """The last `most` tokens of a prompt, and their mel."""
    if len(prompt.tokens) <= most:
        return prompt
    ratio = len(prompt.mel) // len(prompt.tokens)
    return Prompt(prompt.tokens[-most:], prompt.mel[-ratio * most :], prompt.speaker)


def noise_for(s3gen: Any, frames: int, prompt: int, device: torch.device) -> Tensor:
    """What the solver starts from [1, 80, frames], of which `prompt` are the voice's, by upstream's draws.

    For a meanflow the noise of the speech is drawn first, and then all of it once more, of which the prompt's stays.
    """
    n_mels, dtype = s3gen.flow.output_size, s3gen.dtype
    speech = torch.randn(1, n_mels, frames - prompt, device=device, dtype=dtype) if s3gen.meanflow else None
    noise = torch.randn(1, n_mels, frames, device=device, dtype=dtype)
    if speech is not None:
        noise[..., prompt:] = speech
    return noise


class PrefixFlow:
    """The mel of one utterance, pass by pass.

    `longest` is the number of tokens that it can have, `context` the number of tokens before the new ones that a pass
    sees beside the prompt, `prompt` that of the prompt's own, of which all are seen where it is None: they bound a
    pass's work, and an utterance or a prompt that is not longer is not touched by it.
    """

    def __init__(
        self, pipeline: Pipeline, voice: Conditionals, longest: int, context: int, prompt: int | None = None
    ) -> None:
        self._pipeline, self._context = pipeline, context
        s3gen, device = pipeline.model.s3gen, pipeline.device
        self._flow: Any = s3gen.flow
        self._dtype = s3gen.dtype
        whole = prompt_of(voice, device, s3gen.dtype)
        self.prompt = whole if prompt is None else shortened(whole, prompt)
        frames = self._flow.token_mel_ratio * (len(self.prompt.tokens) + longest)
        self._noise = noise_for(s3gen, frames, self._flow.token_mel_ratio * len(self.prompt.tokens), device)

    def __call__(self, tokens: Tensor, first: int, steps: int | None = None) -> Tensor:
        """The mel [1, 80, 2 (n - first)] of the utterance's tokens [n] from `first` on, by one pass.

        It takes `steps` Euler steps, or as many as the whole utterance's mel takes, if that is fewer or none are given.
        """
        start, noise = self.window(tokens, first)
        prompt, ratio = self.prompt, self._flow.token_mel_ratio
        mel, _ = self._flow.inference(
            token=tokens[None, start:],
            token_len=torch.tensor([len(tokens) - start], device=tokens.device),
            prompt_token=prompt.tokens[None],
            prompt_token_len=torch.tensor([len(prompt.tokens)], device=tokens.device),
            prompt_feat=prompt.mel[None],
            prompt_feat_len=None,
            embedding=prompt.speaker[None],
            finalize=True,
            meanflow=self._flow.decoder.estimator.meanflow,
            n_timesteps=self.steps(steps),
            noised_mels=noise,  # as long as prompt and speech: nothing is left of the solver's draw
        )
        return mel[:, :, ratio * (first - start) :].to(self._dtype)

    def window(self, tokens: Tensor, first: int) -> tuple[int, Tensor]:
        """Which of the utterance's tokens [n] a pass that is about those from `first` on sees first, and what it starts
        from [1, 80, frames], prompt included."""
        ratio, start = self._flow.token_mel_ratio, max(0, first - self._context)
        speech = ratio * len(self.prompt.tokens)
        parts = self._noise[:, :, :speech], self._noise[:, :, speech + ratio * start : speech + ratio * len(tokens)]
        return start, torch.cat(parts, dim=2)

    def steps(self, wanted: int | None) -> int:
        """Euler steps of a pass, of which `wanted` are enough."""
        whole = euler_steps(self._pipeline)
        return whole if wanted is None else min(wanted, whole)
