"""HiFT's parts without what upstream works out anew in every call: weights, snakes, and the source, on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def folded(convolution: Any) -> nn.Module:
    """A plain convolution with a weight-normed one's weight."""
    kind = nn.ConvTranspose1d if isinstance(convolution, nn.ConvTranspose1d) else nn.Conv1d
    same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {name: getattr(convolution, name) for name in same}
    has_bias, device = convolution.bias is not None, convolution.weight.device
    plain = nn.utils.skip_init(kind, **settings, bias=has_bias, device=device)
    with torch.no_grad():
        plain.weight.copy_(convolution.weight)
        if has_bias:
            plain.bias.copy_(convolution.bias)
    return plain.requires_grad_(False).eval()


def snake_parameters(module: Any) -> tuple[Tensor, Tensor]:
    """Of upstream's `Snake`: alpha and what its sine is multiplied by, each [C, 1]."""
    alpha = module.alpha.detach()[:, None]
    return alpha, 1 / (alpha + module.no_div_by_zero)


def snake(alpha: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """x [B, C, T] + scale * sin(alpha x)^2, in x's layout."""
    return torch.addcmul(x, (x * alpha).sin_().square_(), scale)


@torch.no_grad()
def harmonic_source(generator: Any, f0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sines at f0 and its overtones, and noise where there is no voice; what `SineGen.forward` computes.

    Args:
        generator: upstream's SineGen, which holds rates and amplitudes.
        f0: [B, 1, samples], Hz.

    Returns:
        source [B, harmonics, samples], voicing [B, 1, samples], noise [B, harmonics, samples].
    """
    return sines_and_noise(generator, f0, torch.cumsum(cycles_a_sample(generator, f0), dim=-1) % 1)


def cycles_a_sample(generator: Any, f0: Tensor) -> Tensor:
    """Of each harmonic, [B, harmonics, T], for f0 [B, 1, T] in Hz."""
    overtones = torch.arange(1, generator.harmonic_num + 2, device=f0.device, dtype=f0.dtype)[:, None]
    return f0 * overtones / generator.sampling_rate


def sines_and_noise(generator: Any, f0: Tensor, cycles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`harmonic_source`, the harmonics having come through `cycles` [B, harmonics, samples] at each sample."""
    return excited(
        generator, f0, cycles, random_phases(cycles.shape[0], cycles.shape[1], f0.device), torch.randn_like(cycles)
    )


def random_phases(rows: int, harmonics: int, device: torch.device) -> Tensor:
    """Where each harmonic begins [B, harmonics, 1], in radians; the first one always at 0."""
    phases = torch.rand(rows, harmonics, 1, device=device) * (2 * math.pi) - math.pi
    phases[:, 0].zero_()
    return phases


def excited(generator: Any, f0: Tensor, cycles: Tensor, phases: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sines_and_noise` from given phases [B, harmonics, 1] and normal draws [B, harmonics, samples]."""
    sines = generator.sine_amp * torch.sin(2 * math.pi * cycles + phases)
    voiced = (f0 > generator.voiced_threshold).float()
    noise_level = voiced * generator.noise_std + (1 - voiced) * generator.sine_amp / 3
    noise = noise_level * draws
    return sines * voiced + noise, voiced, noise
