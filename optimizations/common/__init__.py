"""What the stages share. Nothing flows through here: a stage's machinery and the plugins above it call it.

    graphs.py      a function's GPU work, captured once and launched again as one
    memory.py      memory that buffers share which are never in use at once
    probe.py       which operators and kernels ran inside a stage, for evidence
    modules.py     the pipeline's parts by name, what their weights occupy, undoable changes to them
    padding.py     lengths in whole buckets, and which frames are within a row
    spectra.py     spectrograms and back, of rows in whole buckets
    kernels.py     modules of Triton kernels, imported where they can run
    launching.py   how Triton kernels are launched and compiled, and what the device allows them
    cpp.py         C++ sources, compiled when they are first needed

Begin with `graphs.py`: its docstring says what a function has to be like to be captured, which is why the stages have
static shapes.
"""
