"""Triton kernels for T3's decode step, the engine that runs them, and `python -m optimizations.kernels` to time them.

Importing this package imports no Triton: a machine without it can still list the catalogue.
"""
