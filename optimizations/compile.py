"""Fewer, larger kernels: Triton's or C++ for the decode step, inductor's for the flow's estimator."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GPT2Model, LlamaModel

from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.probe import profile_stages
from optimizations.t3 import cpp_engine
from optimizations.t3.blocks import by_outputs
from optimizations.t3.decoder import Decoder, decoder_of
from optimizations.t3.engines import Engine, StaticEngine

TRITON_ENGINE = "optimizations.t3.triton_engine"
DECODE = ("auto", "triton", "native", "inductor", "none")
OURS = (
    "rmsnorm_qkv_rope",
    "attention",
    "product_residual",
    "rmsnorm_gate_up_silu",
    "final_rmsnorm",
    "speech_head",
)
OURS_OF_GPT2 = (
    "layernorm_qkv",
    "attention",
    "product_residual",
    "layernorm_gelu",
    "final_layernorm",
    "speech_head",
)
"""The kernels of a decode step for few rows, as the profiler names them: a probe speaks alone."""
LAYERS_AT_ONCE = "whole_step"
"""The kernel that takes the place of all but the last two."""
INDUCTOR = ("triton_", "Torch-Compiled Region")
"""How the names of inductor's kernels on a GPU begin, and of its calls from Python, which a replayed graph has not."""


@register
class Compile(Optimization):
    """The decode step and the flow's estimator in fewer and larger kernels.

    Baseline: PyTorch runs an operator at a time, each its own launch that reads its inputs from memory and writes its
    result back: some 25 a layer of T3, a thousand in an estimator step.
    Change: `decode=triton` runs the decode step through kernels written for it (t3/triton_engine.py), five a
    layer, for a Llama and for Turbo's GPT-2; in large batches cuBLAS multiplies, and kernels do the rest. With
    `int8_weights` and `mixed_precision`, on Hopper and later, an utterance's step is one launch for all layers
    (t3/whole_step.cu), but for the last norm and the head, and the head reads 8-bit weights too. A prompt in half
    precision takes nine launches a layer (t3/triton_prompt.py).
    `decode=native` is the step in C++ for a CPU (t3/decode.cpp), all layers in one call, T3's head in another, and the
    draw in a third. `decode=inductor` has PyTorch's compiler fuse the same step; `auto` is triton on CUDA and native on
    a CPU, where without `kv_cache` it leaves it at the estimator. `estimator` has the compiler fuse the flow's
    estimator.
    Why: a decode step is bound by reading T3's weights once; whatever is launched, waited for or written between two
    reads is lost. The estimator is bound by arithmetic, and its norms, activations and transposes are not.
    Where not: on a GPU, launching from Python still costs more than the kernels, so it needs `cuda_graphs` to tell.
    Compilation takes a C++ compiler a second, and inductor half a minute the first time (a warm cache,
    TORCHINDUCTOR_CACHE_DIR, a few seconds); on a CPU its step is no faster than a lean one of operators. The estimator
    is compiled for any length at once, because free speech has a new one every time; a compilation for one length
    would come in the middle of an utterance. Its mask asks the host a question, which breaks the graph in 14 places:
    `flash_attention` (on float32 with backend=sdpa) takes that away. The Triton kernels need `kv_cache`, weights in
    float32, bfloat16, float16 or those of `int8_weights`, and sizes that are powers of two; the C++ needs float32 or
    `int8_weights`, and cannot serve the multilingual guard, which watches the layers' attention.
    The campaign had nothing of the kind.
    Evidence: kernels by name and steps made in C++ in one probe, graphs compiled and broken since the start, and which
    utterances had to wait for a compilation.
    """

    name = "compile"
    extra = True
    requires = ("kv_cache",)

    @dataclass
    class Config:
        """`decode`: auto, triton, native, inductor or none."""

        decode: str = choice(*DECODE)
        estimator: bool = True

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        decode = self._decode(pipeline)
        if decode == "none" and not self.config.estimator:
            return "nothing is left to compile: set compile.decode or compile.estimator"
        if (decode == "inductor" or self.config.estimator) and (reason := _no_inductor(pipeline)):
            return reason
        if decode == "none":
            return None
        if not _has_static_cache(pipeline):
            return f"compile.decode={decode} works on the static cache: switch kv_cache on, or set compile.decode=none"
        if decode == "inductor":
            return None
        if decode == "native":
            stage = pipeline.stages["generate_tokens"]
            if isinstance(stage, Decoder) and stage.guarded:
                return "the multilingual guard watches attention that the step in C++ does not show: leave compile out"
            return cpp_engine.unsupported(pipeline.model.t3.tfmr)
        if find_spec("triton") is None:
            return "no package triton: install it, or use compile.decode=inductor"
        return import_module(TRITON_ENGINE).unsupported(pipeline.model.t3.tfmr)

    def _decode(self, pipeline: Pipeline) -> str:
        if self.config.decode != "auto":
            return self.config.decode
        if pipeline.device.type == "cuda":
            return "triton"
        return "none" if self.config.estimator and not _has_static_cache(pipeline) else "native"

    def apply(self, pipeline: Pipeline) -> None:
        self._compilations = Compilations()
        pipeline.enter_around(self._compilations.of_an_utterance)
        decode = self._decode(pipeline)
        if decode == "triton":
            _use_kernels(pipeline, decoder_of(pipeline, self.name))
        elif decode != "none":
            if decode == "native":
                _lay_out(pipeline)
            step = cpp_engine.CppEngine if decode == "native" else CompiledEngine
            _take_over(pipeline, decoder_of(pipeline, self.name), step)
        if decode == "native":
            head = partial(cpp_engine.linear, pipeline.model.t3.speech_head)
            _use_for_few(pipeline, head, lambda rows: rows <= cpp_engine.MAX_ROWS)
            pipeline.swap(decoder_of(pipeline, self.name), "sample", cpp_engine.sample)
        if self.config.estimator:
            estimator = pipeline.model.s3gen.flow.decoder.estimator
            pipeline.wrap(estimator, "forward", partial(torch.compile, dynamic=True))

    def evidence(self, pipeline: Pipeline) -> Evidence:
        compilations = self._compilations.facts()
        steps_before = _native_steps(pipeline)
        profiles = profile_stages(pipeline, ("generate_tokens", "tokens_to_mel"))
        kernels = profiles["generate_tokens"].kernels
        decode = self._decode(pipeline)
        wanted, several = _kernels_wanted(pipeline) if decode == "triton" else ((), None)
        ours = {name: kernels[name] for name in wanted if kernels[name]}
        fused = {
            stage: sum(n for name, n in (seen.kernels + seen.ops).items() if name.startswith(INDUCTOR))
            for stage, seen in profiles.items()
        }
        in_cpp = _native_steps(pipeline) - steps_before
        facts = {
            "triton_kernels_count": ours,
            "why_several_launches": several,
            "native_steps_count": in_cpp,
            "inductor_calls_count": fused,
            **compilations,
        }
        missing = []
        if not ours.keys() >= set(wanted):
            missing.append("the decode step's kernels")
        if decode == "native" and not in_cpp:
            missing.append("a decode step in C++")
        if decode == "inductor" and not fused["generate_tokens"]:
            missing.append("inductor's kernels in the decode step")
        if self.config.estimator and not fused["tokens_to_mel"]:
            missing.append("inductor's kernels in the flow")
        return Evidence(not missing, facts, f"a probe did not see {' nor '.join(missing)}" if missing else None)


def _kernels_wanted(pipeline: Pipeline) -> tuple[tuple[str, ...], str | None]:
    """The kernels that a probe's decode steps are made of, and why they are not one launch for all layers, if so."""
    decoder: Any = pipeline.stages["generate_tokens"]
    several: str | None = decoder.engine.why_several_launches(decoder.sides)
    ours = OURS_OF_GPT2 if isinstance(pipeline.model.t3.tfmr, GPT2Model) else OURS
    return ours if several else (LAYERS_AT_ONCE, *ours[-2:]), several


def _has_static_cache(pipeline: Pipeline) -> bool:
    stage = pipeline.stages["generate_tokens"]
    return isinstance(stage, Decoder) and isinstance(stage.engine, StaticEngine)


def _native_steps(pipeline: Pipeline) -> int:
    stage = pipeline.stages["generate_tokens"]
    engine = stage.engine if isinstance(stage, Decoder) else None
    return engine.n_steps if isinstance(engine, cpp_engine.CppEngine) else 0


def _use_kernels(pipeline: Pipeline, decoder: Decoder) -> None:
    """The Triton engine in the place of the static one, and its product for the head."""
    kernels: Any = import_module(TRITON_ENGINE)
    _lay_out(pipeline)
    _take_over(pipeline, decoder, kernels.engine_for)
    engine: Any = decoder.engine
    _use_for_few(pipeline, engine.head(pipeline.model.t3.speech_head), kernels.few)


def _lay_out(pipeline: Pipeline) -> None:
    """A GPT-2's weights as our steps read them; a Llama's lie so already."""
    for weight, laid_out in by_outputs(pipeline.model.t3.tfmr):
        pipeline.set_data(weight, laid_out)


def _take_over(pipeline: Pipeline, decoder: Decoder, kind: Callable[..., StaticEngine]) -> None:
    """An engine of that kind over the static cache that is there."""

    def with_its_cache(engine: Engine) -> StaticEngine:
        assert isinstance(engine, StaticEngine)
        return kind(pipeline.model.t3.tfmr, engine.bucket)

    pipeline.wrap(decoder, "engine", with_its_cache)


def _use_for_few(pipeline: Pipeline, product: Callable[[Tensor], Tensor], few: Callable[[int], bool]) -> None:
    """`product` in the head's place, where the rows are few."""
    head = pipeline.model.t3.speech_head
    layers = head.forward

    def forward(hidden: Tensor) -> Tensor:
        return product(hidden) if hidden.dim() == 2 and few(len(hidden)) else layers(hidden)

    if isinstance(head, nn.Linear):
        pipeline.swap(head, "forward", forward)


def _no_inductor(pipeline: Pipeline) -> str | None:
    if pipeline.device.type == "cuda":
        return None if find_spec("triton") else "inductor needs the package triton on CUDA: install it"
    from torch._inductor import config

    # A list of candidates, of which inductor skips the empty ones; on a CPU it cannot do without.
    wanted = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else config.cpp.cxx
    if any(shutil.which(name) for name in wanted if name):
        return None
    return "inductor needs a C++ compiler on a CPU (looked for g++): install one, or set compile.estimator=false"


class CompiledEngine(StaticEngine):
    """The static engine with its fixed step compiled, which steps one by one use as well."""

    def __init__(self, tfmr: LlamaModel, bucket: int = 256) -> None:
        super().__init__(tfmr, bucket)
        self.compiled = torch.compile(super().static_step, fullgraph=True)

    def static_step(self, embeds: Tensor, extent: int) -> Tensor:
        return self.compiled(embeds, extent)

    def step(self, embeds: Tensor) -> Tensor:
        if self.heads:  # their rows are over what is filled, and so never of one shape
            return super().step(embeds)
        if self.length == self.capacity:
            self._reserve(embeds.shape[0], self.length + 1, embeds)
        self.position.fill_(self.length)
        hidden = self.static_step(embeds, min(self.capacity, (self.length // self.bucket + 1) * self.bucket))
        self.length += 1
        return hidden


class Compilations:
    """What dynamo compiled since the start, and inside which utterances."""

    def __init__(self) -> None:
        self._start = _compiled()
        self.by_utterance: list[int] = []

    @contextmanager
    def of_an_utterance(self) -> Iterator[None]:
        """Around one synthesis."""
        before = _compiled()["graphs"]
        try:
            yield
        finally:
            self.by_utterance.append(_compiled()["graphs"] - before)

    def facts(self) -> dict[str, Any]:
        now = _compiled()
        return {
            "graphs_compiled_count": now["graphs"] - self._start["graphs"],
            "graph_breaks_count": now["breaks"] - self._start["breaks"],
            "utterances_count": len(self.by_utterance),
            "graphs_compiled_in_utterance": {str(i): n for i, n in enumerate(self.by_utterance, start=1) if n},
        }


def _compiled() -> dict[str, int]:
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
