"""The watermark: waves -> the same with Perth's mark in them, as arrays on the host. Bound by launches.

Wave at 24 kHz -> 32 kHz -> spectrum -> a small network says by how much to raise or lower bins below 2 kHz -> wave ->
24 kHz. Begin with `perth.py`, which is all there is.
"""
