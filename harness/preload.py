"""What a measuring process has imported before it is born: the forkserver imports this, its children inherit it.

Two things take a quarter off the seconds that this costs. The garbage collector would walk through all modules again
and again while they come in, and finds nothing: it waits, and then leaves them alone for good. And transformers and
diffusers each ask which distribution every installed package is from, so it is found out once.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata

PACKAGES = ("torch", "transformers", "chatterbox.tts", "chatterbox.mtl_tts", "optimizations", "harness.worker")
"""The worker last: it notes how long all of this took."""

gc.disable()
importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)
try:
    for package in PACKAGES:
        importlib.import_module(package)
finally:
    gc.freeze()
    gc.enable()
