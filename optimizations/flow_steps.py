"""Fewer Euler steps in the flow: a trade of quality for time, and labelled as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from harness.pipeline import Pipeline
from harness.settings import number
from optimizations.base import Evidence, Optimization, register
from optimizations.common.probe import probe
from optimizations.flow.steps import upstream_steps

FEWER = {10: 6, 2: 1}
"""What is taken unless said otherwise, by what upstream takes."""


@register
class FlowSteps(Optimization):
    """The flow's differential equation solved in fewer steps.

    Baseline: ten Euler steps on a cosine grid, each one pass of the estimator over prompt and speech, twice for
    guidance.
    Turbo's flow was distilled to two steps on an even grid, without guidance.
    This: fewer steps over the same interval, on the same grid's rule.
    Why: the estimator's passes are nearly all of the flow's time, which falls in proportion.
    Where not: it is no free gain. The solution is a coarser one, and WER and similarity have to clear it; it belongs
    in no combo that has not been listened to.
    The campaign had nothing of the kind.
    Evidence: the steps that the solver is told to take in one probing utterance. Passes of the estimator cannot be
    counted everywhere: where they are captured, no Python runs in them.
    """

    name = "flow_steps"
    extra = True
    lossless = False

    @dataclass
    class Config:
        """`steps`: upstream takes 10, and 2 in Turbo; null is 6 and 1."""

        steps: int | None = number(None, least=1, most=10)

    def unavailable(self, pipeline: Pipeline) -> str | None:
        steps, most = self.config.steps, upstream_steps(pipeline)
        if steps is not None and steps > most:
            return f"this model's flow takes {most} steps: set optimizations.flow_steps.steps to less, or to null"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        s3gen = pipeline.model.s3gen
        steps = self.config.steps or FEWER[upstream_steps(pipeline)]
        pipeline.wrap(s3gen, "flow_inference", lambda solve: partial(solve, n_cfm_timesteps=steps))

    def evidence(self, pipeline: Pipeline) -> Evidence:
        solves: list[int] = []
        handle = pipeline.model.s3gen.flow.decoder.register_forward_pre_hook(
            lambda _solver, _args, kwargs: solves.append(kwargs["n_timesteps"]), with_kwargs=True
        )
        try:
            probe(pipeline)
        finally:
            handle.remove()
        steps, most = sum(solves), upstream_steps(pipeline)
        facts = {"solver_steps_count": steps, "upstream_steps_count": most}
        if not steps:
            return Evidence(False, facts, "the solver was not called")
        if steps == most:
            return Evidence(False, facts, "as many steps as upstream takes")
        return Evidence(True, facts)
