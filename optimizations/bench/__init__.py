"""Times the Triton kernels of a stage on a GPU: `python -m optimizations.bench t3|t3-batched|encoder|flow|vocoder`."""
