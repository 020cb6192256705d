"""How many Euler steps the flow's solver takes."""

from __future__ import annotations

from harness.pipeline import Pipeline

UPSTREAM_STEPS = 10


def euler_steps(pipeline: Pipeline) -> int:
    """Steps that the pipeline's flow takes now: for whoever calls the solver without `flow_inference`."""
    bound = getattr(pipeline.model.s3gen.flow_inference, "keywords", {})
    return bound.get("n_cfm_timesteps", UPSTREAM_STEPS)
