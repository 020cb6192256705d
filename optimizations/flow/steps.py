"""How many Euler steps the flow's solver takes."""

from __future__ import annotations

from harness.pipeline import Pipeline


def upstream_steps(pipeline: Pipeline) -> int:
    """Ten, or the two that Turbo's flow was distilled to."""
    return 2 if pipeline.model.s3gen.meanflow else 10


def euler_steps(pipeline: Pipeline) -> int:
    """Steps that the pipeline's flow takes now: for whoever calls the solver without `flow_inference`."""
    bound = getattr(pipeline.model.s3gen.flow_inference, "keywords", {})
    return bound.get("n_cfm_timesteps", upstream_steps(pipeline))
