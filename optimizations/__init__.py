"""The catalogue: the campaign's twelve optimizations, then the extras, in the order in which they are applied.

Order matters where one transformation sees another's result: memory settings come before anything is moved or
allocated, weights are replaced before they are cast, the decode loop is in place before the text is split for it,
modules are moved off the device when nothing will touch them any more, and the warm-up runs last, over all of it.
"""

from importlib import import_module
from importlib.util import find_spec

from optimizations.base import CATALOGUE, Evidence, Optimization, create, names, register

TWELVE = (
    "cuda_cache",
    "inference_mode",
    "vocos",
    "quantization",
    "mixed_precision",
    "flash_attention",
    "channels_last",
    "alignment_analyzer",
    "kv_cache",
    "token_sequence",
    "cpu_offload",
    "warmup",
)
EXTRAS: tuple[str, ...] = ()

for _name in (*TWELVE, *EXTRAS):
    if find_spec(f"optimizations.{_name}"):
        import_module(f"optimizations.{_name}")

__all__ = ["CATALOGUE", "EXTRAS", "TWELVE", "Evidence", "Optimization", "create", "names", "register"]
