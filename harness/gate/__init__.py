"""The regression gate: may this change be merged?

    limits        the grammar of limits, and the rules of one gate (configs/gate)
    decide        a run held against its rules: passed, regression, undecided, not measured
    repeats       what is undecided is measured again, and counts together with what was there
    references    which run is the measure, since when and why; `accept` replaces it
    outputs       what a terminal, a job summary, JUnit and a program are told

A gate is only worth having if it fails closed: what was not measured does not pass, what is undecided does not pass.
And it is only worth having if it seldom cries wolf: so intervals decide, not estimates.

Exit codes: 0 passed, 1 regression, 2 bad input, 3 nobody knows (undecided, not measured, a failed or edited run).
"""

from harness.gate.decide import Finding, Measured, check, read
from harness.gate.limits import Rules, parse_limit, parse_limits, read_rules, rules_from
from harness.gate.outputs import Judgement, exit_code
from harness.gate.references import accept, find

__all__ = [
    "Finding", "Judgement", "Measured", "Rules", "accept", "check", "exit_code", "find", "parse_limit", "parse_limits",
    "read", "read_rules", "rules_from",
]  # fmt: skip
