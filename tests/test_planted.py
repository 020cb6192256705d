"""Whoever cheats is found out by name: the optimizations of `planted.py`, each in a job of its own on the miniature.

A row says what gives a plugin away: a line of what the summary and the gate say. They take a minute each, `-m slow`;
the checks behind them are tested on their own in `test_draws.py`.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Row:
    """`given_away_by` is found in a line of `said`, or what it may be by where another check was the first to tell."""

    name: str
    given_away_by: str
    overrides: tuple[str, ...] = ()
    or_by: str | None = None
    passes_the_gate: bool = False


ROWS = [
    Row("nothing", "inactive: it changed nothing in the pipeline"),
    Row("put_back", "inactive: what it changed was put back or replaced: stages.join (2)"),
    Row("half_of_the_audio", "s of audio and baseline"),
    Row("crashes", "failed: the process died in speak: SIGSEGV"),
    Row("hangs", "did not answer within"),
    Row("raises_on_one_text", "no bus, please"),
    Row("silence", "timed clips are silent"),
    Row("not_a_number", "timed clips are not finite"),
    Row("untrained_adapter", "worse: wer"),
    Row("another_voice", "worse: sim_resemblyzer"),
    Row("one_flow_step", "worse: sim_resemblyzer"),
    Row("slower", "slower: rtf"),
    Row("a_little_slower", "slower: rtf", ("measure.min_rounds=20", "measure.max_rounds=20")),
    Row("quiet", "dB too quiet"),
    Row("no_watermark", "regression in watermark"),
    Row("first_mark_only", "regression in watermark"),
    Row("random_mark", "regression in watermark"),
    Row("remembers_requests", "it keeps results", passes_the_gate=True),
    Row("remembers_seeds", "it keeps results", passes_the_gate=True),
    Row("remembers_texts", "are those of an earlier request again"),
    Row("every_second_call", "say something else"),
    Row("stretched", "are stretched from an earlier one"),
    Row("loops_a_clip", "say something twice"),
    Row("tokens_twice", "say something else", or_by="in another way than those of the quality pass"),
    Row("padded_with_noise", "say something else"),
    Row("no_flow", "say something else"),
    Row("few_steps_when_timed", "in another way than those of the quality pass"),
    Row("after_the_first_round", "say something else", ("measure.min_rounds=5", "measure.max_rounds=5")),
    Row("slow_clock", "and by the parent's"),
    Row("behind_the_clock", "worked on after it had answered"),
    Row("ends_after_the_clock", "worked on after it had answered"),
    Row("hinders_the_other", "was hindered while the job went on"),
    Row("busy_while_idle", "worked on after it had answered"),
]


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    start_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.devices.LOCKS", tmp_path_factory.mktemp("locks"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_whoever_cheats_is_found_out(row: Row, tmp_path: Path) -> None:
    overrides = ["plugin_modules=[planted]", f"optimizations.{row.name}.enabled=true", *TINY, *row.overrides]
    register_catalogue(overrides, ["planted"])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        (spec,) = expand(compose("config", overrides))
    summary = job.run(spec, tmp_path, lambda *_: None)
    lines, code = said(summary, RunFolder.open(tmp_path / summary.run_id))
    ways = [way for way in (row.given_away_by, row.or_by) if way]
    assert any(way in line for way in ways for line in lines), "\n".join(lines)
    assert code in ({EXIT_PASSED, EXIT_UNKNOWN} if row.passes_the_gate else {EXIT_REGRESSION, EXIT_UNKNOWN})


def test_every_planted_one_has_its_row_and_says_what_it_does_wrong() -> None:
    names = {name for name, cls in CATALOGUE.items() if cls.__module__ == planted.__name__}
    assert names == {row.name for row in ROWS}
    assert all(CATALOGUE[name].__doc__ != planted.Planted.__doc__ for name in names)
