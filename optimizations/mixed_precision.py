"""Half-precision weights where arithmetic and bytes are spent, float32 where rounding is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import cast_parameters, weights_by_part
from optimizations.common.probe import probe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("t3", "flow")


@register
class MixedPrecision(Optimization):
    """bfloat16 or float16 weights for T3's transformer and the flow's estimator; TF32 for float32 products.

    Baseline: everything in float32; upstream offers no other precision, and PyTorch multiplies float32 matrices in
    full precision (cuDNN's convolutions are allowed TF32 from the start).
    Change: `t3`: the weights of the transformer, with casts where its input enters and its output leaves. Embeddings,
    speech head, logits and sampling stay float32. `flow`: the weights of the estimator, except its time embedding and
    its last projection. The ODE solver, the flow's encoder and HiFT stay float32. `tf32`: on CUDA, products of what
    is still float32 use the tensor cores, with 10 bits of mantissa.
    Why: decoding reads every weight of T3 once per token, and half as many bytes take half the time; the estimator
    is bound by arithmetic, where tensor cores are many times faster.
    Where not: as long as launching kernels is what takes the time, as in upstream's own loop and eager flow, halved
    kernels change little; it pays with a lean decode loop or long prompts. A CPU needs instructions for the dtype
    (AVX-512 or AMX) to run it at all sensibly, and there products of two rows with a matrix, which is all that
    decoding does, gain nothing that pays for the casts: `parts=auto` leaves T3 alone on a CPU.
    The trap: `S3Token2Mel.forward` casts every tensor of the voice to the dtype of the flow's first parameter, token
    ids included, and bfloat16 has no room for ids above 256. So the flow as a whole is never cast.
    The campaign claimed 20 to 35 % speed and 25 to 30 % VRAM as expected values; nothing was measured.
    Evidence: count and bytes of weights by part and dtype, before and now (parts that did not change are left out);
    the dtype in which the logits came out; the dtype of the flow as upstream sees it; whether the voices' prompt
    tokens are what they were.
    """

    name = "mixed_precision"
    lossless = False

    @dataclass
    class Config:
        """`parts`: a list of t3 and flow; auto is both on CUDA, and the flow alone on a CPU."""

        dtype: str = choice("auto", "bfloat16", "float16")
        tf32: bool = True
        parts: str | list[str] = choice("auto", listed=PARTS)

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if self._dtype(pipeline.device) is not None:
            return None
        if self.config.dtype == "auto":
            return f"{pipeline.device} supports neither bfloat16 nor float16: use a device that does"
        return f"{pipeline.device} does not support {self.config.dtype}: try mixed_precision.dtype=auto"

    def _dtype(self, device: torch.device) -> torch.dtype | None:
        wanted = DTYPES if self.config.dtype == "auto" else (self.config.dtype,)
        return next((DTYPES[name] for name in wanted if _supports(device, DTYPES[name])), None)

    def apply(self, pipeline: Pipeline) -> None:
        self._before = weights_by_part(pipeline)
        self._prompts = _prompt_tokens(pipeline)
        dtype = self._dtype(pipeline.device)
        assert dtype is not None
        parts = self.config.parts
        if parts == "auto":
            parts = list(PARTS) if pipeline.device.type == "cuda" else ["flow"]
        if "t3" in parts:
            cast_transformer(pipeline, dtype)
        if "flow" in parts:
            cast_estimator(pipeline, dtype)
        if self.config.tf32 and pipeline.device.type == "cuda":
            pipeline.swap(torch.backends.cuda.matmul, "allow_tf32", True)
            pipeline.swap(torch.backends.cudnn, "allow_tf32", True)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        seen: list[torch.dtype] = []
        head = pipeline.model.t3.speech_head
        handle = head.register_forward_hook(lambda _module, _args, logits: seen.append(logits.dtype))
        try:
            probe(pipeline)
        finally:
            handle.remove()
        now, prompts = weights_by_part(pipeline), _prompt_tokens(pipeline)
        changed = [part for part in now if now[part] != self._before[part]]
        facts = {
            "weights_before": {part: self._before[part] for part in changed},
            "weights_now": {part: now[part] for part in changed},
            "logits_dtypes": sorted({_name(dtype) for dtype in seen}),
            "flow_dtype": _name(pipeline.model.s3gen.dtype),
            "prompt_tokens_unchanged": all(torch.equal(prompts[v], self._prompts[v]) for v in self._prompts),
            "tf32": pipeline.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        }
        return Evidence(active=bool(changed), facts=facts, reason=None if changed else "every weight was cast before")


def cast_transformer(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """T3's transformer in `dtype`; whoever calls it as a module still gives and gets float32."""
    tfmr = pipeline.model.t3.tfmr

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].to(dtype)}

    def leave(_module: nn.Module, _args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.float()
        if output.hidden_states is not None:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output

    cast_parameters(pipeline, tfmr, dtype)
    pipeline.on_undo(tfmr.register_forward_pre_hook(enter, with_kwargs=True).remove)
    pipeline.on_undo(tfmr.register_forward_hook(leave).remove)


def cast_estimator(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """The flow's estimator in `dtype`, float32 outside.

    Upstream's solver asks the estimator for its dtype, which is that of the last projection, and would integrate in
    it. That projection stays float32, so the mel is summed up in full precision. The time embedding stays as well:
    it takes sines of up to 1000 t, and bfloat16 cannot tell t = 0.1 from 0.1002.
    """
    estimator = pipeline.model.s3gen.flow.decoder.estimator

    def casting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast_forward(x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks=None, cond=None, r=None) -> Tensor:
            x, mask, mu = x.to(dtype), mask.to(dtype), mu.to(dtype)
            return forward(x=x, mask=mask, mu=mu, t=t, spks=_to(spks, dtype), cond=_to(cond, dtype), r=r)

        return cast_forward

    time = [estimator.time_mlp, *([estimator.time_embed_mixer] if estimator.meanflow else [])]
    cast_parameters(pipeline, estimator, dtype, keep=(*time, estimator.final_proj))
    leave_time = time[-1].register_forward_hook(lambda _module, _args, output: output.to(dtype))
    enter_projection = estimator.final_proj.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    pipeline.on_undo(leave_time.remove)
    pipeline.on_undo(enter_projection.remove)
    pipeline.wrap(estimator, "forward", casting)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for the dtype; emulation does not count."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _prompt_tokens(pipeline: Pipeline) -> dict[str, Tensor]:
    """The voices' prompt token ids; upstream keeps them as float32 after the first synthesis."""
    return {name: voice.gen["prompt_token"].cpu().long() for name, voice in pipeline.voices.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
