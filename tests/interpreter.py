"""Marks for tests of Triton kernels, which decides on import whether it compiles or interprets."""

import os
from importlib import import_module

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton has no part in it")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child, whose Triton interprets")


def _behave_as_a_gpu():
    """What Triton's interpreter does otherwise: it cuts bfloat16 off, and takes no loop to a number that was loaded."""
    interpreter = import_module("triton.runtime.interpreter")
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def rounded(array, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(array, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_with_index, rounded


if INTERPRETED:
    _behave_as_a_gpu()
