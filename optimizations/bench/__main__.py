"""`python -m optimizations.bench t3|t3-turbo|t3-batched|encoder|flow|vocoder`: tables in Markdown, in some minutes."""

from __future__ import annotations

import argparse
from importlib import import_module

import torch

BENCHES = {
    "t3": "optimizations.bench.t3",
    "t3-turbo": "optimizations.bench.t3_turbo",
    "t3-batched": "optimizations.bench.t3_batched",
    "encoder": "optimizations.bench.encoder",
    "flow": "optimizations.bench.flow",
    "vocoder": "optimizations.bench.vocoder",
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m optimizations.bench", description="Time the kernels of a stage.")
    parser.add_argument("stage", choices=BENCHES)
    stage = parser.parse_args().stage
    if not torch.cuda.is_available():
        raise SystemExit("these kernels are timed on a CUDA device, and there is none here")
    import_module(BENCHES[stage]).main()


if __name__ == "__main__":
    main()
