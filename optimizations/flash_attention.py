"""Attention without a matrix of scores: flash kernels where the pipeline's attention can use them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from chatterbox.models.s3gen import decoder as estimator_module
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import compute_dtypes, queries_keys_values
from optimizations.common.probe import profile_stages
from optimizations.t3.blocks import blocks_of

BACKENDS = ("auto", "flash_attn", "sdpa_flash", "sdpa")
HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256
PREFERENCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WATCHED = ("generate_tokens", "tokens_to_mel")


@register
class FlashAttention(Optimization):
    """Flash kernels for the flow's estimator and for T3.

    Baseline: PyTorch chooses the kernel. In the estimator upstream adds a mask to the scores; for one full-length
    utterance it is all zeros, but a CUDA flash kernel takes no mask at all, so the choice falls on a slower one. And
    upstream asks the host, 14 times a step, whether the mask is empty somewhere: 140 waits for the GPU per utterance.
    Change: where a mask lets everything through, asked once per utterance, the estimator goes without; a padded
    batch keeps its mask. `sdpa_flash` also tells PyTorch to prefer flash kernels, in T3's prompt and decode steps too.
    `flash_attn` gives the estimator's attention to the package of that name. `sdpa` only drops the mask. `auto` takes
    the first that is there.
    Why: no L x L scores in memory, and one pass over keys and values. It tells in the estimator (1000 and more
    frames, 56 blocks, ten steps) and in T3's prompt; a decode step has one query, its time is reading the cache.
    Where not: on CUDA, flash kernels take float16 and bfloat16 only, so without mixed precision there is nothing to
    choose; heads wider than 256; the flow's encoder, whose relative positions are added to the scores; a multilingual
    T3 in upstream's own loop, whose analyzer wants the attention matrices. On a CPU PyTorch takes its CPU flash kernel
    already in the baseline: only the mask is saved.
    The campaign claimed 25 to 40 % "when available"; it never ran.
    Evidence: for each of the two stages, the attention kernels that the profiler saw in a probe and how often the
    host read a number; and how many flow calls went without mask since the start.
    """

    name = "flash_attention"
    requires_on_gpu = ("mixed_precision",)

    @dataclass
    class Config:
        backend: str = choice(*BACKENDS)

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        backend = self.config.backend
        if backend == "sdpa":
            return None
        if backend == "flash_attn" and not _has_package(pipeline):
            return (
                "no package flash_attn for this device: install flash-attn, or use flash_attention.backend=sdpa_flash"
            )
        widest = max(_head_sizes(pipeline).values())
        if widest > MAX_HEAD_SIZE:
            return f"a head of {widest} is too wide for flash kernels, which take up to {MAX_HEAD_SIZE}"
        dtypes = compute_dtypes(pipeline)
        needed = ("flow",) if backend == "flash_attn" else ("t3", "flow")
        if pipeline.device.type == "cuda" and not any(dtypes[part] in HALF for part in needed):
            return (
                f"flash kernels on CUDA take half precision, but {' and '.join(needed)} compute in float32: switch "
                "mixed_precision on, or use flash_attention.backend=sdpa to drop the estimator's mask only"
            )
        return None

    def apply(self, pipeline: Pipeline) -> None:
        flow_decoder = pipeline.model.s3gen.flow.decoder
        self._mask = mask = _UnneededMask()
        pipeline.on_undo(flow_decoder.register_forward_pre_hook(mask.enter, with_kwargs=True).remove)
        pipeline.on_undo(flow_decoder.register_forward_hook(mask.leave, always_call=True).remove)
        for helper in ("add_optional_chunk_mask", "mask_to_bias"):
            pipeline.wrap(estimator_module, helper, mask.spare)
        backend = self._backend(pipeline)
        if backend == "flash_attn":
            for module in flow_decoder.estimator.modules():
                if isinstance(module, Attention):
                    pipeline.wrap(module, "processor", _FlashAttnProcessor)
        if backend != "sdpa":
            pipeline.enter_around(prefer_flash)

    def _backend(self, pipeline: Pipeline) -> str:
        if self.config.backend != "auto":
            return self.config.backend
        half = compute_dtypes(pipeline)["flow"] in HALF
        return "flash_attn" if half and _has_package(pipeline) else "sdpa_flash"

    def evidence(self, pipeline: Pipeline) -> Evidence:
        profiles = profile_stages(pipeline, WATCHED)
        facts: dict[str, Any] = {
            stage: {"kernels_count": profile.attention, "host_reads_count": profile.n_host_reads}
            for stage, profile in profiles.items()
        }
        flash = any("flash" in kernel for profile in profiles.values() for kernel in profile.attention)
        facts["flow_calls_without_mask_count"] = self._mask.n_spared
        wanted = flash or self.config.backend == "sdpa"
        active = wanted and self._mask.n_spared > 0
        reason = None
        if not wanted:
            reason = "the profiler saw no flash kernel"
        elif not active:
            reason = "every mask of the flow was needed"
        return Evidence(active=active, facts=facts, reason=reason)


class _UnneededMask:
    """Knows, while the flow's decoder runs, whether its mask lets every frame through, and then does without it."""

    def __init__(self) -> None:
        self.unneeded = False
        self.n_spared = 0

    def enter(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs["mask"] if "mask" in kwargs else args[1]
        self.unneeded = bool(mask.all())
        self.n_spared += self.unneeded

    def leave(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.unneeded = False

    def spare(self, helper: Any) -> Any:
        """Upstream's `helper`, which gives no mask while none is needed."""

        def maybe(*args: Any) -> Any:
            return None if self.unneeded else helper(*args)

        return maybe


class _FlashAttnProcessor:
    """diffusers' attention through the package flash_attn, where there is no mask; else as it was."""

    def __init__(self, masked: Any) -> None:
        self.masked = masked

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Self-attention over hidden_states [B, T, C]."""
        if attention_mask is not None or hidden_states.dtype not in HALF:
            return self.masked(attention, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        from flash_attn import flash_attn_func

        return attention.to_out[0](flash_attn_func(*queries_keys_values(attention, hidden_states)).flatten(2))


def prefer_flash() -> AbstractContextManager:
    """PyTorch's order of attention kernels: flash, then memory-efficient, then plain."""
    return sdpa_kernel(PREFERENCE, set_priority=True)


def _has_package(pipeline: Pipeline) -> bool:
    return pipeline.device.type == "cuda" and find_spec("flash_attn") is not None


def _head_sizes(pipeline: Pipeline) -> dict[str, int]:
    attention = next(m for m in pipeline.model.s3gen.flow.decoder.estimator.modules() if isinstance(m, Attention))
    return {
        "t3": blocks_of(pipeline.model.t3.tfmr).head_dim,
        "flow": attention.inner_dim // attention.heads,
    }
