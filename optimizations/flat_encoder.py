"""The flow's encoder as five Triton kernels a layer."""

from __future__ import annotations

from typing import Any

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.kernels import for_device
from optimizations.common.probe import profile_stages
from optimizations.flow.static_shape import OWN_WAY

KERNELS = "optimizations.flow.triton_encoder"


@register
class FlatEncoder(Optimization):
    """The encoder's layers in few kernels, whose attention makes no matrix of frames by frames.

    Baseline: ten conformer layers, six at 25 frames a second and four at 50, of many small launches each. What
    the distance between two frames adds to their score has a matrix of its own, twice as wide as the scores', which is
    padded, reshaped, cut and added to them; all of it in float32.
    This: two Triton kernels (flow/encoder_kernels.py), five launches a layer and nine beside. One product does norm,
    bias, activation and residual with it, or is a convolution that zeroes what is behind a row's end. Attention looks
    each distance up where it adds it, and keeps no scores. What layers make of the distances is a constant, so it is
    made once for each power of two of frames. A frame's repetition, the convolution behind it and the linear layer
    behind that are one product.
    Why: 250 tokens and their prompt are 0.07 TFLOP, which matrix units need a fraction of the time for; the rest goes
    into scores that are moved about, the more the more rows there are. Where TF32 is allowed for products of matrices,
    as by `mixed_precision`, operands are float16, which has the same 10 bits of mantissa in half the bytes; where it is
    not, products are as exact as float32, and less is gained.
    Where not: on a CPU; on a GPU before Ampere. Compiling takes some seconds the first time. Beside upstream's weights
    there is a copy in float16, of 70 MB, and 14 MB for the distances of up to 512 tokens. Without `cuda_graphs` the
    kernels wait for the launches from Python.
    Rows may be of any length, for `cuda_graphs` and `batching` too. The hidden frames are as far from float32 as the
    baseline's are with TF32.
    The campaign had nothing of the kind.
    Evidence: calls of the encoder that took this way (a captured call counts once), in which dtype, and the kernels by
    name that a probe saw in the flow.
    """

    name = "flat_encoder"
    extra = True
    only_on_gpu = True

    def unavailable(self, pipeline: Pipeline) -> str | None:
        module = for_device(KERNELS, pipeline.device)
        if module is None:
            return f"on {pipeline.device} the flat encoder needs CUDA and the package triton"
        reason: str | None = module.unsupported(pipeline.model.s3gen.flow.encoder)
        return reason

    def apply(self, pipeline: Pipeline) -> None:
        encoder = pipeline.model.s3gen.flow.encoder
        self._kernels: Any = for_device(KERNELS, pipeline.device)
        self._flat = self._kernels.TritonEncoder(encoder, self._kernels.allowed())
        pipeline.swap(encoder, "forward", self._flat.forward)
        # What captures or batches rows puts something else in place of `forward`, and asks for this.
        pipeline.swap_item(vars(encoder), OWN_WAY, self._flat.encode)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        seen = profile_stages(pipeline, ["tokens_to_mel"])["tokens_to_mel"]
        counts = {name: seen.kernels[name] for name in self._kernels.NAMES}
        facts: dict[str, Any] = {
            "encoder_calls_count": self._flat.n_calls,
            "operands_dtype": str(self._flat.precision.dtype).removeprefix("torch."),
            "triton_kernels_count": counts,
        }
        if missing := [name for name, n in counts.items() if not n]:
            return Evidence(False, facts, f"a probe did not see the kernels {', '.join(missing)}")
        return Evidence(True, facts)
