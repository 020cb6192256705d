"""T3: text tokens and a voice's conditionals -> speech tokens, 25 per second of audio. Bound by launches or bandwidth.

A `Decoder` takes the place of the stage `generate_tokens`. It turns segments into prompts, has an engine read them, and
then goes token by token: embedding -> engine -> head -> guidance and sampling -> embedding. Begin with `decoder.py`.

    decoder.py            the stage: batches, prompts, voices' prefixes, the loop from token to token
    captured_loop.py      the same loop over buffers that stay where they are, so that CUDA graphs hold its steps
    slots.py              the same step for requests that come and go, each at a position of its own
    blocks.py             the two kinds of transformer, a Llama and a GPT-2, without attention
    engines.py            the transformer over a cache that grows, or over a static one
    sampling.py           from logits to the next token
    guard.py              the multilingual model's alignment guard
    token_buffers.py      what one step leaves on the device for the next one
    int8.py               linear layers in 8 bits; triton_int8.py multiplies a prompt's rows with them
    triton_engine.py      the static engine's step in Triton kernels: triton_decode.py for a few rows,
                          triton_batched.py for many; triton_sampling.py draws the token
    triton_prompt.py      a prompt through all layers in few launches
    triton_gpt2.py        what a GPT-2 has of its own among the kernels for few rows
    whole_step.py         a step of one or two rows against weights in 8 bits, all layers in one launch (whole_step.cu)
    cpp_engine.py         the static engine's step in C++ (decode.cpp), for a CPU
"""
