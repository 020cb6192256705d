"""HiFT without what it works out anew in every call."""

from __future__ import annotations

from functools import partial

from chatterbox.models.s3gen.hifigan import Snake
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.cpp import CompilerError
from optimizations.common.modules import parts, replace_module
from optimizations.common.probe import profile_stages
from optimizations.vocoder.cpp_hift import ConvolutionInCpp, SnakeInCpp, fits
from optimizations.vocoder.hift import folded, harmonic_source, snake, snake_parameters


@register
class FusedVocoder(Optimization):
    """HiFT with its weight norm folded in and its random source drawn where it is used.

    Baseline: every convolution of HiFT computes its weight from a direction and a length in each call, though neither
    changes after training. The random phases of the source's harmonics are drawn on the CPU and copied over, and its
    harmonics are filled in one by one.
    This: the weights are computed once; the harmonics are one tensor, their phases drawn on the device; Snake makes
    three passes over the signal instead of five. On a CPU with a compiler, convolutions and Snake are C++
    (vocoder/hift.cpp), and the channels stay innermost.
    Why: on a GPU it saves some five launches for each of 70 convolutions, and a copy that the device waits for. On a
    CPU, PyTorch's layout has time innermost, which a convolution of few channels pays for with two thirds of its time;
    and its library makes machine code for each new length of a signal, which the C++ does not need.
    Where not: where another vocoder is in HiFT's place.
    On a CPU the wave is the baseline's to rounding. On a GPU the phases come from another generator: other random
    phases, of the same distribution, for harmonics above the first.
    The campaign had nothing of the kind. (Upstream's own `remove_weight_norm` predates parametrizations and raises.)
    Evidence: convolutions folded, those that ran in C++, and calls of the weight-norm operator and copies to the device
    in one probe.
    """

    name = "fused_vocoder"
    extra = True

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if other := pipeline.replaced_by.get("mel_to_wave"):
            return f"{other} has taken HiFT's place, so there is nothing to fold: switch one of them off"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        vocoder = parts(pipeline)["vocoder"]
        paths = [path for path, module in vocoder.named_modules() if is_parametrized(module, "weight")]
        for path in paths:
            replace_module(pipeline, vocoder, path, folded)
        for module in vocoder.modules():
            if isinstance(module, Snake) and not module.alpha_logscale:
                pipeline.swap(module, "forward", partial(snake, *snake_parameters(module)))
        self._convolutions = _in_cpp(pipeline, vocoder) if pipeline.device.type == "cpu" else []
        source = pipeline.model.s3gen.mel2wav.m_source.l_sin_gen
        pipeline.swap(source, "forward", lambda f0: harmonic_source(source, f0))
        self.n_folded = len(paths)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        seen = profile_stages(pipeline, ["mel_to_wave"])["mel_to_wave"]
        norms = sum(n for op, n in seen.ops.items() if "weight_norm" in op)
        facts = {
            "convolutions_folded_count": self.n_folded,
            "convolutions_in_cpp_count": sum(c.n_calls > 0 for c in self._convolutions),
            "weight_norm_calls_count": norms,
            **seen.copies,
        }
        if norms or not self.n_folded:
            return Evidence(False, facts, "weights are still normalized in each call")
        return Evidence(True, facts)


def _in_cpp(pipeline: Pipeline, vocoder: nn.Module) -> list[ConvolutionInCpp]:
    """Have C++ compute what it can, and nothing where there is no compiler."""
    modules = [module for module in vocoder.modules() if fits(module)]
    try:
        stand_ins = {m: SnakeInCpp(m) if isinstance(m, Snake) else ConvolutionInCpp(m) for m in modules}
    except CompilerError:
        return []
    for module, stand_in in stand_ins.items():
        name = "forward" if isinstance(module, Snake) else "_conv_forward"
        pipeline.swap_item(vars(module), name, stand_in)
    return [stand_in for stand_in in stand_ins.values() if isinstance(stand_in, ConvolutionInCpp)]
