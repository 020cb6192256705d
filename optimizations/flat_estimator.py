"""The flow's estimator as a flat function over [rows, frames, channels]."""

from __future__ import annotations

from typing import Any

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.kernels import for_device
from optimizations.common.probe import profile_stages
from optimizations.flow.estimator import ChannelsLastEstimator, is_known

KERNELS = "optimizations.flow.triton_estimator"


@register
class FlatEstimator(Optimization):
    """The estimator's layers with the channels innermost throughout.

    Baseline: convolutions want time innermost, attention and layer norm want the channels, so every block transposes
    to and fro; it pads for each convolution, and multiplies by a mask that lets everything through, twice per block.
    This: all in one layout. A causal convolution is a matrix product over windows of three frames. One product gives
    queries, keys and values, and one all blocks' shares of the time. Mish takes one exponential, by
    x * tanh(log(1 + e^x)) = x - 2x / (e^x (e^x + 2) + 2).
    On a CPU these are PyTorch's operators. There is no mask; a batch whose rows are padded has one that counts, and
    takes upstream's way. On a GPU they are four Triton kernels (flow/triton_kernels.py) that do the norms,
    activations, biases and sums between the products as well, 22 launches for a ResNet and its four blocks; of a mask
    they want the rows' lengths, and that for attention alone. With `cuda_graphs` the solver's steps stay in this
    layout: a fifth kernel does the last product, guidance and Euler's sum, and times are embedded before the first
    step.
    Why: products of matrices are what matrix units are for; on a CPU half of the baseline's time went into moving,
    masking and bending numbers, on a GPU with captured steps as much, and attention was far from what the GPU can do.
    Where not: the kernels want half precision from `mixed_precision`, and a GPU from Ampere on; compiling them takes
    half a minute the first time. Their tiles were chosen on an H200; elsewhere a sweep has to say whether they pay.
    Without `cuda_graphs` they wait for the launches from Python. `compile.estimator` finds nothing to do next to them.
    Products are in the dtype of the weights, so in bfloat16 with `mixed_precision`; sums, norms and activations in
    float32 in any case, on a GPU what one block hands to the next too. In float32, on a CPU, the mel is the baseline's
    to rounding.
    The campaign had nothing of the kind.
    Evidence: calls of the estimator that took this way and that did not (a captured call counts once); convolutions of
    PyTorch's that a probe saw in the flow; on a GPU the kernels by name that it saw.
    """

    name = "flat_estimator"
    extra = True
    requires_on_gpu = ("mixed_precision",)

    def unavailable(self, pipeline: Pipeline) -> str | None:
        estimator = pipeline.model.s3gen.flow.decoder.estimator
        if not is_known(estimator):
            return "the flow's estimator has other layers than upstream's causal one, or quantized ones"
        if pipeline.device.type == "cpu":
            return None
        module = for_device(KERNELS, pipeline.device)
        if module is None:
            return f"on {pipeline.device} the flat estimator needs CUDA and the package triton"
        reason: str | None = module.unsupported(estimator)
        return reason

    def apply(self, pipeline: Pipeline) -> None:
        estimator = pipeline.model.s3gen.flow.decoder.estimator
        self._kernels = for_device(KERNELS, pipeline.device)
        make = self._kernels.TritonEstimator if self._kernels else ChannelsLastEstimator
        self._flat: ChannelsLastEstimator = make(estimator, masked=estimator.forward)
        pipeline.wrap(estimator, "forward", lambda _masked: self._flat.forward)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        calls, masked = self._flat.n_calls, self._flat.n_masked
        seen = profile_stages(pipeline, ["tokens_to_mel"])["tokens_to_mel"]
        facts: dict[str, Any] = {
            "flat_calls_count": calls,
            "masked_calls_count": masked,
            "convolutions_count": seen.ops["aten::conv1d"],
        }
        if self._kernels:
            facts["triton_kernels_count"] = {name: seen.kernels[name] for name in self._kernels.NAMES}
            if missing := [name for name, n in facts["triton_kernels_count"].items() if not n]:
                return Evidence(False, facts, f"a probe did not see the kernels {', '.join(missing)}")
        return Evidence(bool(calls), facts, None if calls else "every call had padded rows")
