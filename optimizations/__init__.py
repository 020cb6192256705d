"""The catalogue: the campaign's twelve optimizations and the extras, in the order in which they are applied.

Order matters where one transformation sees another's result: memory settings come before anything is moved or
allocated, modules are replaced before their weights are cast or laid out, the decode loop is in place before the text
is split for it, modules are moved off the device when nothing will touch them any more, and the warm-up runs last,
over all of it.
"""

from importlib import import_module

from optimizations.base import CATALOGUE, Evidence, Optimization, create, names, register, requirements

APPLIED = (
    "cuda_cache",
    "upstream_head",
    "inference_mode",
    "vocos",
    "fused_vocoder",
    "flow_steps",
    "quantization",
    "int8_weights",
    "mixed_precision",
    "flash_attention",
    "flat_encoder",
    "flat_estimator",
    "channels_last",
    "alignment_analyzer",
    "kv_cache",
    "compile",
    "int8_cache",
    "token_sequence",
    "conditioning_cache",
    "gpu_watermark",
    "batching",
    "cuda_graphs",
    "streaming",
    "continuous_batching",
    "cpu_offload",
    "warmup",
)
for _name in APPLIED:
    import_module(f"optimizations.{_name}")

TWELVE = tuple(name for name in APPLIED if not CATALOGUE[name].extra)
EXTRAS = tuple(name for name in APPLIED if CATALOGUE[name].extra)

__all__ = ["CATALOGUE", "EXTRAS", "TWELVE", "Evidence", "Optimization", "create", "names", "register", "requirements"]
