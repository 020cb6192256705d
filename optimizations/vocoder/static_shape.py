"""HiFT in shapes that stay: a mel padded to whole buckets gives, up to its end, the wave that it gives alone.

HiFT's convolutions look ahead as well as back, and at a mel's end they see zeros. Behind a padded mel's end they would
see what the layer before made of the padding, a bias at least. So what enters a convolution is zeroed behind the end,
at the rate that it has there. The two ends of the way are not convolutions: the source's spectrogram mirrors the signal
at its end, and the inverse transform divides by the windows that overlap there; both are done with the end as a number
on the device (`common/spectra.py`).

`decode` says it in PyTorch's operators; on a GPU the Triton kernels of `triton_kernels.py` do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizations.common.graphs import Graphs
from optimizations.common.kernels import for_device
from optimizations.common.padding import padded_length, within
from optimizations.common.spectra import signal, spectrogram
from optimizations.vocoder.hift import cycles_a_sample, sines_and_noise

STAGE = "mel_to_wave"
OWN_WAY = "source_of"
"""A vocoder's attribute that stands for `batched.source`, where it has one."""
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mels [B, 80, F], sources [B, 1, samples] and the frames [1] after which they end -> waves [B, samples]."""


class StaticVocoder:
    """`HiFTGenerator.inference` and `.decode`, with mels padded to multiples of `bucket` frames."""

    def __init__(self, hift: Any, graphs: Graphs, bucket: int) -> None:
        self.hift, self.graphs, self.bucket = hift, graphs, bucket
        self._inputs: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        module = for_device("optimizations.vocoder.triton_hift", hift.conv_pre.bias.device)
        self._kernels = module if module and module.unsupported(hift) is None else None
        self._decoders: dict[Hashable, Decode] = {}

    @torch.inference_mode()
    def inference(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mel [B, 80, n] -> wave [B, 480 n] and the source [B, 1, 480 n] that it was made from, as upstream's."""
        if cache_source is not None and cache_source.shape[2]:
            excitation = self.source(speech_feat)
            excitation[..., : cache_source.shape[2]] = cache_source
            return self.decode(speech_feat, excitation), excitation
        mel, _, frames = self._padded(speech_feat)
        n_samples = self._samples * speech_feat.shape[2]
        decode = self._decoder()

        def whole() -> tuple[Tensor, Tensor]:
            excitation = source(self.hift, mel, frames)
            return decode(mel, excitation, frames), excitation

        wave, excitation = self.graphs.run(STAGE, ("inference", *mel.shape), whole)
        return wave[:, :n_samples].clone(), excitation[..., :n_samples].clone()

    @torch.inference_mode()
    def source(self, speech_feat: Tensor) -> Tensor:
        """Mel [B, 80, n] -> the source [B, 1, 480 n] that `inference` would make of it."""
        mel, _, frames = self._padded(speech_feat)
        excitation = self.graphs.run(STAGE, ("source", *mel.shape), lambda: source(self.hift, mel, frames))
        return excitation[..., : self._samples * speech_feat.shape[2]].clone()

    @torch.inference_mode()
    def decode(self, x: Tensor, s: Tensor) -> Tensor:
        """Mel [B, 80, n] and source [B, 1, 480 n] -> wave [B, 480 n], as upstream's."""
        mel, excitation, frames = self._padded(x)
        excitation.copy_(F.pad(s, (0, excitation.shape[2] - s.shape[2])))
        decode = self._decoder()
        wave = self.graphs.run(STAGE, ("decode", *mel.shape), lambda: decode(mel, excitation, frames))
        return wave[:, : s.shape[2]].clone()

    def _decoder(self) -> Decode:
        """What decodes in the precision that PyTorch's switches allow now.

        It is made when first asked for: by then other optimizations have done to the weights what they do, and no
        capture has begun, in which the kernels' layout of them would be made again in every replay.
        """
        if self._kernels is None:
            return partial(decode, self.hift)
        precision = self._kernels.allowed()
        if precision not in self._decoders:
            self._decoders[precision] = self._kernels.ChannelsLastHiFT(self.hift, precision).decode
        return self._decoders[precision]

    @property
    def _samples(self) -> int:
        """Samples a mel frame."""
        return int(self.hift.f0_upsamp.scale_factor)

    def _padded(self, mel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers for a mel of that length: mel, filled in, source [B, 1, samples], and length [1] in frames."""
        rows, n_mels, length = mel.shape
        frames = padded_length(length, self.bucket)
        if (rows, frames) not in self._inputs:
            self._inputs[rows, frames] = (
                mel.new_zeros(rows, n_mels, frames),
                mel.new_zeros(rows, 1, self._samples * frames),
                torch.zeros(1, dtype=torch.long, device=mel.device),
            )
        buffers = self._inputs[rows, frames]
        buffers[0].copy_(F.pad(mel, (0, frames - length)))
        buffers[2].fill_(length)
        return buffers


def source(hift: Any, mel: Tensor, frames: Tensor) -> Tensor:
    """HiFT's excitation [B, 1, samples] of mels [B, 80, F], zero behind `frames` [1]; noise behind the end is harmless.

    The harmonics are drawn on the device, as in `hift.py`: a random number from the host cannot be captured.
    """
    valid = within(frames, mel.shape[2]).to(mel.dtype)
    x = mel
    for layer in hift.f0_predictor.condnet:
        x = layer(x) * valid
    pitch = hift.f0_predictor.classifier(x.transpose(1, 2)).squeeze(-1).abs() * valid
    generator, f0 = hift.m_source.l_sin_gen, pitch[:, None]
    cycles = framed_cycles(cycles_a_sample(generator, f0), int(hift.f0_upsamp.scale_factor))
    sines, _, _ = sines_and_noise(generator, hift.f0_upsamp(f0), cycles)
    return hift.m_source.l_tanh(hift.m_source.l_linear(sines.transpose(1, 2))).transpose(1, 2)


def framed_cycles(each: Tensor, per_frame: int) -> Tensor:
    """The running sum, modulo 1, of `each` [B, n, F] taken `per_frame` times in a row: [B, n, F * per_frame].

    What is constant within a frame need not be added up sample by sample. Whole frames are added up in float64, as the
    sum of 10 s has no digits left in float32 behind the third.
    """
    before = (torch.cumsum(each.double(), dim=-1) - each) * per_frame % 1
    samples = torch.arange(1, per_frame + 1, device=each.device, dtype=each.dtype)
    return ((before.to(each.dtype)[..., None] + each[..., None] * samples) % 1).flatten(-2)


def masked(x: Tensor, activation: nn.Module, length: Tensor) -> Tensor:
    """An activation with f(0) = 0 on a signal [B, C, T], with zeros from a length [1] on."""
    return activation(x) * within(length, x.shape[2])


def decode(hift: Any, mel: Tensor, excitation: Tensor, frames: Tensor) -> Tensor:
    """Waves [B, samples] of mels [B, 80, F] and sources [B, 1, samples] that end after `frames` [1]."""
    n_fft, hop = hift.istft_params["n_fft"], hift.istft_params["hop_len"]
    window = hift.stft_window
    per_frame = excitation.shape[2] // mel.shape[2]
    steps = frames * (per_frame // hop)  # of the spectrogram, which has one more
    valid = within(steps + 1, excitation.shape[2] // hop + 1).to(mel.dtype)
    bins = spectrogram(excitation[:, 0], frames * per_frame, window, hop).transpose(1, 2)
    spectrum = torch.cat((bins.real, bins.imag), dim=1) * valid

    x = hift.conv_pre(mel) * within(frames, mel.shape[2])
    length = frames
    for level, up in enumerate(hift.ups):
        x = up(F.leaky_relu(x, hift.lrelu_slope))
        length = length * up.stride[0]
        if level == hift.num_upsamples - 1:
            x, length = hift.reflection_pad(x), length + 1
        x = x + residual(hift.source_resblocks[level], hift.source_downs[level](spectrum), length)
        blocks = hift.resblocks[level * hift.num_kernels : (level + 1) * hift.num_kernels]
        total = reduce(torch.add, (residual(block, x, length) for block in blocks))
        x = total * (within(length, x.shape[2]) / hift.num_kernels)
    x = hift.conv_post(F.leaky_relu(x))
    n_bins = n_fft // 2 + 1
    magnitude = torch.exp(x[:, :n_bins]).clip(max=1e2) * valid
    phase = torch.sin(x[:, n_bins:])
    bins = torch.complex(magnitude * phase.cos(), magnitude * phase.sin()).transpose(1, 2)
    wave = signal(bins, valid, window, hop)
    return wave.clamp(-hift.audio_limit, hift.audio_limit)


def residual(block: Any, x: Tensor, length: Tensor) -> Tensor:
    """`ResBlock.forward` on signals [B, C, T] that end after `length` [1]; what it leaves behind means nothing."""
    pairs = zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True)
    for first, widening, second, closing in pairs:
        x = x + closing(masked(widening(masked(x, first, length)), second, length))
    return x
