"""How utterances are handed to the pipeline: one file a scenario, and everything that a scenario decides in it."""

from harness.scenarios.base import Call, Heard, Request, Scenario, Turn
from harness.scenarios.loaded import Loaded
from harness.scenarios.offline import Offline
from harness.scenarios.single_stream import SingleStream
from harness.scenarios.streaming import Streaming

__all__ = ["Call", "Heard", "Request", "Scenario", "Turn", "scenario"]

_SCENARIOS: dict[str, Scenario] = {one.name: one for one in (SingleStream(), Offline(), Streaming(), Loaded())}


def scenario(name: str) -> Scenario:
    """The scenario of that name; KeyError for an unknown one."""
    return _SCENARIOS[name]
