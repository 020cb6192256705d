"""Whoever cheats is found out by name: the optimizations of `planted.py`, each in a job of its own on the miniature.

A row says what gives a plugin away: a line of what the summary and the gate say. What is not seen yet is a strict
xfail with what is missing. One row runs always; `-m slow` runs the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import planted
import pytest
from hydra import compose, initialize_config_dir

from harness import gate, job
from harness.config import CONFIGS, expand, register_catalogue
from harness.gate.outputs import EXIT_PASSED, EXIT_REGRESSION, EXIT_UNKNOWN
from harness.results import RunFolder, Summary
from harness.worker import start_server
from optimizations import CATALOGUE

TEXTS = (
    "[{id: a, text: 'She put the letters back in the drawer.'},"
    "{id: b, text: 'The bus was late. Nobody seemed to mind.'},"
    "{id: c, text: 'There is some more bread on the kitchen table.'}]"
)
TINY = (
    "pipeline.threads=1",
    "device=cpu",
    f"workload.texts={TEXTS}",
    "workload.seeds=[1,2]",
    "measure.min_rounds=2",
    "measure.max_rounds=2",
    "measure.warmup_calls=1",
    "measure.call_limit_s=60",
)
FRESH = "the speed pass asks for the same texts, seeds and lengths in every round"
LISTEN = "nobody listens to what was timed"
CLOCK = "the child's own clock is believed"
PEERS = "what the one process does to the other is not watched"


@dataclass(frozen=True)
class Row:
    """`given_away_by` is found in a line of `said`; `open` is what is missing for that."""

    name: str
    given_away_by: str
    open: str | None = None
    quick: bool = False
    passes_the_gate: bool = False


ROWS = [
    Row("nothing", "inactive: it changed nothing in the pipeline"),
    Row("put_back", "inactive: what it changed was put back or replaced: stages.join (2)"),
    Row("half_of_the_audio", "s of audio and the baseline"),
    Row("crashes", "failed: the process died in speak: SIGSEGV"),
    Row("hangs", "did not answer within"),
    Row("raises_on_one_text", "no bus, please"),
    Row("silence", "regression in clips"),
    Row("not_a_number", "regression in clips"),
    Row("untrained_adapter", "worse: wer"),
    Row("another_voice", "worse: sim_resemblyzer"),
    Row("one_flow_step", "worse: sim_resemblyzer"),
    Row("slower", "slower: rtf"),
    Row("a_little_slower", "slower: rtf"),
    Row("quiet", "quieter", open="the level of a clip is not held against the baseline's"),
    Row("no_watermark", "regression in watermark", quick=True),
    Row("first_mark_only", "regression in watermark"),
    Row("random_mark", "regression in watermark"),
    Row("remembers_requests", "not faster", open=FRESH, passes_the_gate=True),
    Row("remembers_seeds", "not faster", open=FRESH, passes_the_gate=True),
    Row("remembers_texts", "worse: sim_resemblyzer", open=LISTEN),
    Row("every_second_call", "worse: wer"),
    Row("stretched", "worse: wer in what was timed", open=LISTEN),
    Row("loops_a_clip", "worse: wer in what was timed", open=LISTEN),
    Row("tokens_twice", "worse: wer in what was timed", open=LISTEN),
    Row("padded_with_noise", "worse: wer in what was timed", open=LISTEN),
    Row("no_flow", "worse: wer in what was timed", open=LISTEN),
    Row("few_steps_when_timed", "worse: sim_resemblyzer in what was timed", open=LISTEN),
    Row("after_the_first_round", "worse: wer in what was timed", open=LISTEN),
    Row("slow_clock", "the parent's clock", open=CLOCK),
    Row("behind_the_clock", "silent in what was timed", open=LISTEN),
    Row("ends_after_the_clock", "regression in clips"),
    Row("hinders_the_other", "affinity", open=PEERS),
    Row("busy_while_idle", "busy while it should be idle", open=PEERS),
]


def params() -> Iterator[object]:
    for row in ROWS:
        marks = [] if row.quick else [pytest.mark.slow]
        marks += [pytest.mark.xfail(strict=True, reason=row.open)] if row.open else []
        yield pytest.param(row, id=row.name, marks=marks)


def said(summary: Summary, folder: RunFolder) -> tuple[list[str], int]:
    """All that is said against a run, a line each, and the gate's exit code under its default limits."""
    run = gate.read(folder)
    findings = gate.check(run, gate.read_rules(CONFIGS / "gate" / "default.yaml"))
    rtf = summary.comparison["rtf"].verdict
    lines = ["faster" if rtf == "faster" else "not faster"]
    lines += [f"failed: {(v.error or '').strip().splitlines()[-1]}" for v in summary.variants.values() if v.error]
    lines += [f"{record.verdict}: {name}" for name, record in summary.comparison.items()]
    lines += [f"{record['status']}: {record['reason']}" for record in summary.optimizations.values()]
    lines += [f"{finding.outcome} in {finding.subject}: {finding.reason}" for finding in findings]
    lines += summary.warnings
    return lines, gate.exit_code([gate.Judgement(run, None, findings, "")])


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory):
    start_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.devices.LOCKS", tmp_path_factory.mktemp("locks"))
        yield


@pytest.mark.parametrize("row", params())
@pytest.mark.timeout(600)
def test_whoever_cheats_is_found_out(row: Row, tmp_path: Path) -> None:
    overrides = ["plugin_modules=[planted]", f"optimizations.{row.name}.enabled=true", *TINY]
    register_catalogue(overrides, ["planted"])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        (spec,) = expand(compose("config", overrides))
    summary = job.run(spec, tmp_path, lambda *_: None)
    lines, code = said(summary, RunFolder.open(tmp_path / summary.run_id))
    assert any(row.given_away_by in line for line in lines), "\n".join(lines)
    assert code in ({EXIT_PASSED, EXIT_UNKNOWN} if row.passes_the_gate else {EXIT_REGRESSION, EXIT_UNKNOWN})


def test_every_planted_one_has_its_row_and_says_what_it_does_wrong() -> None:
    names = {name for name, cls in CATALOGUE.items() if cls.__module__ == planted.__name__}
    assert names == {row.name for row in ROWS}
    assert all(CATALOGUE[name].__doc__ != planted.Planted.__doc__ for name in names)
