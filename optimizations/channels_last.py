"""Convolutions with the channels innermost in memory, wherever that is faster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from harness.measure import synchronize
from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import parts

PARTS = ("flow_encoder", "flow_estimator", "vocoder")
PROBE_TEXT, PROBE_TOKENS = "This sentence is only spoken to see which way is faster.", 100
WORTHWHILE = 1.05
"""How many times as fast a convolution has to be for its layout to change."""
ROUNDS = 5


@register
class ChannelsLast(Optimization):
    """1-D convolutions as 2-D ones of height 1, in channels-last memory.

    Baseline: PyTorch lays a [N, C, L] tensor out with time innermost. Tensor cores and the CPU's vector units
    multiply along channels, so the libraries' fastest kernels want those innermost; given the other layout they
    transpose, or take another kernel.

    This: input and weight are viewed as [N, C, 1, L] in the layout of `torch.channels_last`, which exists for 4-D
    tensors only, and go through `conv2d`. Plain weights are laid out so once; HiFT's come out of weight
    normalization anew in each call, and are laid out there. Results leave as they are, so a following
    convolution need not transpose again.

    Where it cannot help: a lone convolution between layers of the other layout pays for transposing, and small ones
    take as long as their launch. So `modules=auto` times every convolution both ways on its real input, in one
    probing utterance, and only moves those that are more than 5 % faster. Transposed convolutions stay.

    Campaign: "incompatible, rolled back: 3D tensors".

    Evidence: how many convolutions ran converted, in how many calls, the strides of what they returned, and the
    timings that made `auto` choose. If none pays, the plugin says so and is inactive.
    """

    name = "channels_last"

    @dataclass
    class Config:
        """`modules`: auto, or a list of parts to convert whole: flow_encoder, flow_estimator, vocoder."""

        modules: str | list[str] = choice("auto", listed=PARTS)

    def apply(self, pipeline: Pipeline) -> None:
        chosen = self.config.modules
        auto = chosen == "auto"
        convolutions = _convolutions(pipeline, PARTS if auto else chosen)
        self.timings: dict[Signature, Timing] = {}
        if auto:
            self.timings, signatures = _try(pipeline, convolutions)
            self._seen = Counter(signatures.values())
            convolutions = [c for c, signature in signatures.items() if self.timings[signature].pays]
        self.converted = [_convert(pipeline, convolution) for convolution in convolutions]

    def evidence(self, pipeline: Pipeline) -> Evidence:
        ran = [convolution for convolution in self.converted if convolution.n_calls]
        facts = {
            "convolutions_converted_count": len(ran),
            "calls_count": sum(convolution.n_calls for convolution in ran),
            "output_strides": sorted({convolution.strides for convolution in ran})[:8],
            "timings": [
                {
                    "convolution": str(signature),
                    "modules_count": self._seen[signature],
                    "plain_us": round(timing.plain_s * 1e6, 1),
                    "channels_last_us": round(timing.channels_last_s * 1e6, 1),
                    "converted": timing.pays,
                }
                for signature, timing in self.timings.items()
            ],
        }
        if ran and all(convolution.channels_innermost for convolution in ran):
            return Evidence(True, facts)
        if self.timings and not self.converted:
            seen = sum(self._seen.values())
            reason = f"none pays: no convolution of {seen} ran more than 5 % faster as channels-last on this device"
        elif ran:
            reason = "converted convolutions returned tensors of the ordinary layout"
        else:
            reason = "no converted convolution ran"
        return Evidence(False, facts, reason)


class ChannelsLastConvolution:
    """Stands in for a convolution's `_conv_forward`, after padding and weight normalization."""

    def __init__(self, convolution: nn.Conv1d) -> None:
        self.stride, self.padding, self.dilation, self.groups = _geometry(convolution)
        self.n_calls = 0
        self.strides: tuple[int, ...] = ()

    @property
    def channels_innermost(self) -> bool:
        """Whether the last result [N, C, L] had neighbouring channels next to each other."""
        return self.strides[1] == 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(
            _channels_last(x),
            _channels_last(weight),
            bias,
            stride=(1, self.stride),
            padding=(0, self.padding),
            dilation=(1, self.dilation),
            groups=self.groups,
        ).squeeze(-2)
        self.n_calls += 1
        self.strides = y.stride()
        return y


def _channels_last(x: Tensor) -> Tensor:
    """[a, b, c] -> [a, b, 1, c] with b innermost; a view where it lies so already."""
    return x.unsqueeze(-2).contiguous(memory_format=torch.channels_last)


def _geometry(convolution: nn.Conv1d) -> tuple[int, int, int, int]:
    """Stride, padding, dilation and groups; upstream has NumPy's integers among them."""
    assert not isinstance(convolution.padding, str)
    (stride,), (padding,), (dilation,) = convolution.stride, convolution.padding, convolution.dilation
    return int(stride), int(padding), int(dilation), convolution.groups


def _convolutions(pipeline: Pipeline, names: Sequence[str]) -> list[nn.Conv1d]:
    """The parts' 1-D convolutions that `conv2d` can stand in for."""
    modules = [module for name in names for module in parts(pipeline)[name].modules()]
    convolutions = [module for module in modules if isinstance(module, nn.Conv1d)]
    return [c for c in convolutions if c.padding_mode == "zeros" and not isinstance(c.padding, str)]


def _convert(pipeline: Pipeline, convolution: nn.Conv1d) -> ChannelsLastConvolution:
    """Lay the weight out, where it is stored as such, and take over the call; undone by `pipeline.reset`."""
    stand_in = ChannelsLastConvolution(convolution)
    if not is_parametrized(convolution, "weight"):
        weight = convolution.weight

        def restore() -> None:
            weight.data = weight.data.contiguous()

        pipeline.on_undo(restore)
        weight.data = _channels_last(weight.data).squeeze(-2)
    pipeline.swap_item(vars(convolution), "_conv_forward", stand_in)
    return stand_in


# -- which pay? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """All that decides how long a convolution takes."""

    weight: tuple[int, ...]
    geometry: tuple[int, ...]
    input: tuple[int, ...]
    input_strides: tuple[int, ...]
    dtype: torch.dtype
    computed_weight: bool

    def __str__(self) -> str:
        channels_out, channels_in, kernel = self.weight
        stride, _, dilation, groups = self.geometry
        steps = f" stride {stride}" * (stride > 1) + f" dilation {dilation}" * (dilation > 1)
        steps += f" groups {groups}" * (groups > 1)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{channels_in}>{channels_out} kernel {kernel}{steps} on {list(self.input)} {dtype}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call, both ways."""

    plain_s: float
    channels_last_s: float

    @property
    def pays(self) -> bool:
        return self.plain_s > WORTHWHILE * self.channels_last_s


def _try(
    pipeline: Pipeline, convolutions: list[nn.Conv1d]
) -> tuple[dict[Signature, Timing], dict[nn.Conv1d, Signature]]:
    """Speak once, timing each kind of convolution where it first meets real input."""
    timings: dict[Signature, Timing] = {}
    signatures: dict[nn.Conv1d, Signature] = {}

    def trial(convolution: nn.Conv1d) -> Callable[..., Tensor]:
        plain, candidate = convolution._conv_forward, ChannelsLastConvolution(convolution)
        computed = is_parametrized(convolution, "weight")

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if convolution not in signatures:
                geometry = _geometry(convolution)
                signature = Signature(tuple(weight.shape), geometry, tuple(x.shape), x.stride(), x.dtype, computed)
                signatures[convolution] = signature
                if signature not in timings:
                    laid_out = weight if computed else _channels_last(weight).squeeze(-2)
                    timings[signature] = _compare(
                        lambda: plain(x, weight, bias), lambda: candidate(x, laid_out, bias), pipeline.device
                    )
            return plain(x, weight, bias)

        return run

    with _standing_in({convolution: trial(convolution) for convolution in convolutions}):
        _probe(pipeline)
    return timings, signatures


@contextmanager
def _standing_in(stand_ins: dict[nn.Conv1d, Callable[..., Tensor]]) -> Iterator[None]:
    before = {convolution: vars(convolution).get("_conv_forward") for convolution in stand_ins}
    for convolution, stand_in in stand_ins.items():
        vars(convolution)["_conv_forward"] = stand_in
    try:
        yield
    finally:
        for convolution, other in before.items():
            if other is None:
                del vars(convolution)["_conv_forward"]
            else:
                vars(convolution)["_conv_forward"] = other


def _probe(pipeline: Pipeline) -> None:
    """Speak four seconds, and leave the random numbers as they were."""
    cuda = [pipeline.device] if pipeline.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        pipeline.synthesize(PROBE_TEXT, next(iter(pipeline.voices)), seed=0, n_tokens=PROBE_TOKENS)


def _compare(plain: Callable[[], Tensor], candidate: Callable[[], Tensor], device: torch.device) -> Timing:
    """The best of some rounds each, taken in turns so that a busy moment hits both."""
    calls = 10 if device.type == "cuda" else 1  # several, so that the queue's length hides the host
    best = [float("inf"), float("inf")]
    for _ in range(1 + ROUNDS):
        for way, call in enumerate((plain, candidate)):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize(device)
            best[way] = min(best[way], (time.perf_counter() - start) / calls)
    return Timing(*best)
