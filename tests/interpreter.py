"""Marks for tests of Triton kernels, which decides on import whether it compiles or interprets."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton has no part in it")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child, whose Triton interprets")
