"""S3Gen's flow: speech tokens and a voice's prompt -> mel, 80 bins at 50 frames/s. Bound by arithmetic.

Tokens -> encoder -> a differential equation, solved in ten Euler steps from noise to mel; each step is one pass of the
estimator over prompt and speech, twice for guidance. Begin with `static_shape.py`.

    static_shape.py       encoder and solver over rows padded to whole buckets, so that CUDA graphs hold them
    layer_steps.py        the solver's steps through the estimator's layers
    triton_encoder.py     the encoder through the Triton kernels of encoder_kernels.py
    estimator.py          the estimator as one function with the channels innermost
    triton_estimator.py   the same through the Triton kernels of triton_kernels.py
    triton_steps.py       the solver's steps in that estimator's own layout
    tiles.py              which part of its work one program of these kernels does
    batched.py            rows of different length, each as it is alone
    prefix.py             a voice's prompt, and the mel of an utterance whose end is not there yet
    steps.py              how many Euler steps the solver takes
"""
