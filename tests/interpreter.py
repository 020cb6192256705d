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
    """Mends what Triton's interpreter does otherwise, with bfloat16, and with a loop to a number that was loaded.

    It cuts bfloat16 off where a GPU rounds, multiplies its bits as if they were integers, and refuses the loop.
    """
    interpreter, tl = import_module("triton.runtime.interpreter"), import_module("triton.language")
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def rounded(array, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(array, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened(handle):
        if handle.dtype.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *others):
        return multiply(self, widened(a), widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._patch_lang_tensor, interpreter._convert_float = patch_with_index, rounded


if INTERPRETED:
    _behave_as_a_gpu()
