"""C++ sources compiled when they are first needed, for the machine at hand."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++")


class CompilerError(RuntimeError):
    """No compiler, or one that rejects the source; says what to do."""


@cache
def load(source: Path) -> ctypes.CDLL:
    """The source's functions. It takes a compiler a second, so the result is kept in no file.

    Its threads are PyTorch's own, whose OpenMP is the one that the process has loaded. Raises CompilerError.
    """
    candidates = (os.environ.get("CXX", ""), *COMPILERS)
    compiler = next((path for name in candidates if (path := shutil.which(name))), None)
    if compiler is None:
        raise CompilerError(f"a C++ compiler is needed (looked for {', '.join(COMPILERS)}): install one")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        done = subprocess.run([compiler, *FLAGS, source, "-o", library], capture_output=True, text=True)
        if done.returncode:
            errors = (line for line in done.stderr.splitlines() if "error" in line)
            said = next(errors, f"exit code {done.returncode}")
            raise CompilerError(f"{compiler} cannot compile {source.name} ({said}): set CXX to another compiler")
        return ctypes.CDLL(str(library))
