"""The pipeline's parts by name, what their weights occupy, and undoable changes to them.

The originals of what is replaced or cast wait on the CPU: kept on the GPU, they would hide the memory that the change
saves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from chatterbox.models.s3gen.matcha.transformer import BasicTransformerBlock
from torch import Tensor, nn

from harness.pipeline import Pipeline


def parts(pipeline: Pipeline) -> dict[str, nn.Module]:
    """Every module of the pipeline under one of eleven names; nothing is in two parts."""
    model = pipeline.model
    t3, s3gen, flow = model.t3, model.s3gen, model.s3gen.flow
    return {
        "t3_transformer": t3.tfmr,
        "t3_embeddings": _together(t3.text_emb, t3.speech_emb, t3.text_pos_emb, t3.speech_pos_emb),
        "t3_heads": _together(t3.text_head, t3.speech_head),
        "t3_conditioning": t3.cond_enc,
        "s3_tokenizer": s3gen.tokenizer,
        "speaker_encoder": s3gen.speaker_encoder,
        "voice_encoder": model.ve,
        "flow_encoder": _together(flow.input_embedding, flow.spk_embed_affine_layer, flow.encoder, flow.encoder_proj),
        "flow_estimator": flow.decoder.estimator,
        "vocoder": s3gen.mel2wav,
        "watermarker": _together(getattr(model.watermarker, "perth_net", None)),
    }


CONDITIONING = ("s3_tokenizer", "speaker_encoder", "voice_encoder")
"""The parts that only turn a reference clip into conditionals."""


def _together(*modules: nn.Module | None) -> nn.ModuleList:
    return nn.ModuleList(module for module in modules if module is not None)


def compute_dtypes(pipeline: Pipeline) -> dict[str, torch.dtype]:
    """The dtype in which T3's transformer and the flow's estimator compute: their norms', which nobody quantizes."""
    estimator = pipeline.model.s3gen.flow.decoder.estimator
    block = next(module for module in estimator.modules() if isinstance(module, BasicTransformerBlock))
    norm = next(module for module in pipeline.model.t3.tfmr.modules() if type(module).__name__.endswith("Norm"))
    return {"t3": norm.weight.dtype, "flow": block.norm1.weight.dtype}


# -- what weights occupy -------------------------------------------------------------------------------------------

Weights = dict[str, dict[str, int]]
"""By dtype: `count` of weights and the `bytes` that hold them, with a quantized weight's scales."""


def weights(module: nn.Module) -> Weights:
    """The module's parameters and buffers by dtype; 4-bit weights go by the name of their code (nf4)."""
    held: Weights = {}
    for dtype, count, size in _stored(module):
        entry = held.setdefault(dtype, {"count": 0, "bytes": 0})
        entry["count"] += count
        entry["bytes"] += size
    return held


def weights_by_part(pipeline: Pipeline) -> dict[str, Weights]:
    """`weights` of every part."""
    return {name: weights(module) for name, module in parts(pipeline).items()}


def n_bytes(held: Weights) -> int:
    """Bytes over all dtypes."""
    return sum(entry["bytes"] for entry in held.values())


def _stored(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(dtype, count, bytes) of each parameter and buffer, once."""
    seen: set[int] = set()
    for sub in module.modules():
        for tensor in (*sub.parameters(recurse=False), *sub.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                yield state.quant_type, state.shape.numel(), tensor.nbytes + _state_bytes(state)
            else:
                yield _dtype_name(tensor), tensor.numel(), tensor.nbytes + _scale_bytes(sub, tensor)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _state_bytes(state: Any) -> int:
    """The tensors of bitsandbytes' 4-bit state: block scales, their own scales, the code."""
    values = vars(state).values()
    nested = sum(_state_bytes(value) for value in values if type(value) is type(state))
    return nested + sum(value.nbytes for value in values if isinstance(value, Tensor))


def _scale_bytes(module: nn.Module, tensor: Tensor) -> int:
    """The row scales of an INT8 weight: on the weight before its first use, in the layer's state after it."""
    if tensor.dtype != torch.int8:
        return 0
    scales = getattr(tensor, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return 0 if scales is None else scales.nbytes


# -- undoable changes ----------------------------------------------------------------------------------------------


def replace_module(pipeline: Pipeline, root: nn.Module, path: str, build: Callable[[nn.Module], nn.Module]) -> None:
    """Put `build(old)` in the place of the submodule at `path`, a dotted name below `root`.

    The old module moves to the CPU once `build` has seen it, and back when the pipeline is reset.
    """
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    old = getattr(owner, name)
    device = next(old.parameters()).device
    pipeline.swap(owner, name, build(old))
    pipeline.on_undo(lambda: old.to(device))
    old.to("cpu")


def cast_parameters(
    pipeline: Pipeline, module: nn.Module, dtype: torch.dtype, keep: Collection[nn.Module] = ()
) -> None:
    """Cast a module's floating-point parameters; those of the modules in `keep`, and all buffers, stay.

    A Llama's one floating buffer holds its rotary frequencies, which half precision would spoil. Quantized weights
    are integers, so they stay as well.
    """
    kept = {id(parameter) for other in keep for parameter in other.parameters()}
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and id(parameter) not in kept:
            pipeline.set_data(parameter, parameter.data.to(dtype))


def queries_keys_values(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What diffusers' `Attention` projects hidden states [B, T, C] to, split by head: each [B, T, heads, C / heads]."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    # A list, because not every compiler reads a generator.
    q, k, v = [project(hidden).unflatten(-1, (attention.heads, -1)) for project in projections]
    return q, k, v
