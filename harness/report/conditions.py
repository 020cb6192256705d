"""The report's small print: where and how it was measured, and how to do it again."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness import declared, stats
from harness.locations import CONFIGS
from harness.report import noise, words
from harness.report.data import Run, by_place
from harness.report.document import Block, Code, Paragraph, Section, Table
from harness.report.outcome import verdict_sentence
from harness.results import BASELINE


def conditions(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = [Table([place, ""], _rows(here)) for place, here in by_place(runs).items()]
    floors = [run for run in runs if run.is_noise_floor]
    blocks += [Paragraph(f"Noise floor, identical code against itself: {verdict_sentence(run)}") for run in floors]
    limits = {name: value for run in runs for name, value in run.summary.thresholds.items()}
    judged = [f"{words.label(name)} {_threshold(name, value)}" for name, value in limits.items()]
    blocks.append(
        Paragraph(
            "A verdict needs the whole 95 % interval (paired bootstrap, by text where there are at least "
            f"{stats.MIN_PAIRS} texts, {stats.RESAMPLES:,} resamples) beyond a practical threshold: "
            f"{words.listing(judged)}. Fewer than {stats.MIN_PAIRS} pairs give no verdict. Outliers are reported "
            "and kept."
        )
    )
    blocks.append(Paragraph(_about_processes(runs)))
    blocks.append(Paragraph(CLOCK))
    return Section("Measuring conditions", blocks)


CLOCK = (
    "Times are by the clock of the experiment, from a request to its answer, in another process than the pipeline's; "
    "the pipeline's own clock has to agree. No text comes twice with the same seed and length. Every timed clip is "
    "listened to, and some, chosen by chance, are judged like those of the quality pass."
)


def _about_processes(runs: Sequence[Run]) -> str:
    """What a figure that a process has once is worth."""
    fewest = min(run.summary.processes for run in runs)
    if fewest >= stats.MIN_PROCESSES:
        return f"Every figure comes from {fewest} pairs of processes or more."
    return (
        "Loading, the first call, model memory and resident memory are figures that a process has once. They have an "
        f"interval from {stats.MIN_PROCESSES} pairs of processes on (`measure.processes`); here there "
        f"{words.agree(fewest, 'was', 'were')} {fewest}, so they are shown without one."
    )


SAID_OF_PIPELINES = ("sampling", "language")
"""Settings of a pipeline that `Run.pipeline_overrides` names."""


def _threshold(name: str, value: float) -> str:
    return f"{100 * value:g} %" if stats.metric(name).kind == "ratio" else f"{value:g}"


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    environment, job = runs[0].environment, runs[0].job
    workload, quality = job.get("workload") or {}, job.get("quality") or {}
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    variables = environment.get("variables") or {}
    rows = {
        "device": _record(environment.get("device") or runs[0].summary.device),
        "processor": _record(environment.get("cpu")),
        "system": environment.get("system"),
        "Python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "variables": ", ".join(f"{name}={value}" for name, value in variables.items()),
        "workload": words.listing(sorted({run.summary.workload for run in runs})),
        "scenario": words.listing(sorted({run.summary.scenario for run in runs})),
        "seeds": ", ".join(map(str, workload.get("seeds") or [])),
        "voices": ", ".join(map(str, workload.get("voices") or [])),
        "judges": _record({key: quality[key] for key in ("asr", "speaker") if quality.get(key)}),
        "pairs of processes": _span([run.summary.processes for run in runs]),
        "pairs, speed pass": _span([run.change("rtf").n for run in runs]),
        "a call's time varies": noise.told(runs),
        "clips per variant, quality pass": _span([run.combo.n_expected for run in runs]),
        "memory": MEMORY[runs[0].baseline.memory_kind],
        "orchestration": _orchestration(runs),
        "commit": words.listing(sorted({run.summary.git for run in runs})),
        "configuration": words.listing(sorted({run.summary.config_hash for run in runs})),
        "summarised": _span([run.summary.created for run in runs]),
    }
    return [[name, words.said(str(value))] for name, value in rows.items() if value]


MEMORY = {"vram": "bytes allocated on the GPU", "rss": "resident set of each variant's process"}


def _record(record: Any) -> str:
    if not isinstance(record, dict):
        return str(record or "")
    return ", ".join(f"{name} {words.fact(value)}" for name, value in record.items() if value is not None)


def _span(values: Sequence[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _orchestration(runs: Sequence[Run]) -> str | None:
    shares = [share for run in runs if (share := run.summary.timing.get("orchestration_share")) is not None]
    return f"at most {words.percent(max(shares))} of a job's time" if shares else None


def repeat(runs: Sequence[Run]) -> Section:
    commands = list(dict.fromkeys(command(run) for run in runs))
    results = runs[0].path if len(runs) == 1 else runs[0].path.parent
    again = f"python -m harness report {_from_here(results)}"
    blocks: list[Block] = [
        Paragraph("The measurement, and this report from its results:"),
        Code("\n".join([*commands, again]), "sh"),
        Paragraph(f"Runs: {', '.join(words.code(run.summary.run_id) for run in runs)}."),
    ]
    return Section("How to repeat this", blocks)


def _from_here(path: Path) -> Path:
    """A path that also means something to somebody else: relative, or at least without the machine's folders."""
    resolved, here = path.resolve(), Path.cwd().resolve()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else Path("results") / resolved.name


def command(run: Run) -> str:
    """The command line that measures this run again (the whole of its configuration is in its job.yaml)."""
    sweep, parts = run.job.get("sweep"), ["python run_sweep.py"]
    if sweep == "one_at_a_time":
        parts.append(f"+sweep={sweep}")
    elif sweep:
        parts += [f"+combo={_whole_combo(run)}", f"+sweep={sweep}", *_of_its_design(run)]
    elif run.is_noise_floor:
        parts.append("+combo=baseline")
    elif run.name != "custom":
        parts.append(f"+combo={run.name}")
    if not sweep and run.summary.against != BASELINE:
        parts.append(f"against={run.summary.against}")
    parts += [*run.pipeline_overrides(), f"workload={run.summary.workload}"]
    for group in ("measure", "quality"):
        name = (run.job.get(group) or {}).get("name", "default")
        parts += [f"{group}={name}"] if name != "default" else []
    own = {name: value for name, value in (run.job.get("pipeline") or {}).items() if name not in SAID_OF_PIPELINES}
    for group, settings in [
        ("pipeline", own),
        *((g, run.job.get(g) or {}) for g in ("workload", "measure", "quality")),
    ]:
        parts += _changed(group, settings)
    parts += _changed_optimizations(run)
    modules = run.job.get("plugin_modules") or []
    parts += [shlex.quote(f"plugin_modules=[{','.join(map(str, modules))}]")] if modules else []
    device = run.environment.get("device")
    if isinstance(device, dict) and device.get("type"):
        parts.append(f"device={device['type']}")
    return " ".join(parts)


def _of_its_design(run: Run) -> list[str]:
    """What the command said of a sweep's jobs."""
    over, runs = run.job.get("over") or [], run.job.get("runs")
    crossed = [shlex.quote(f"over={_override(over)}")] if run.job.get("sweep") == "factorial" and over else []
    screened = [f"runs={runs}"] if runs is not None else []
    return [*crossed, *screened, *(["paired_with=combo"] if run.job.get("paired_with") == "combo" else [])]


def _whole_combo(run: Run) -> str:
    """The combo that a sweep left something out of, or else the run's own."""
    return re.split("-without-|-screening-", run.name)[0]


def _changed(group: str, settings: Mapping[str, Any]) -> list[str]:
    """The overrides that lead from a group's file to the settings, those that the file knows."""
    usual = dict(_flat(group, _usual(CONFIGS / group / f"{settings.get('name')}.yaml")))
    changed = [(name, value) for name, value in _flat(group, settings) if name in usual and usual[name] != value]
    return [shlex.quote(f"{name}={_override(value)}") for name, value in changed]


def _changed_optimizations(run: Run) -> list[str]:
    """The overrides that lead from the combo's file to what was on, and with which parameters.

    What a sweep switches it switches again. Of a stranger's optimization, whose defaults only its import can tell, all
    parameters are given.
    """
    combo = _usual(CONFIGS / "combo" / f"{_whole_combo(run)}.yaml").get("optimizations") or {}
    known, all_on = declared.read(), _all_on(run)
    changed: dict[str, Any] = {}
    for name, settings in (run.job.get("optimizations") or {}).items():
        usual = {"enabled": False, **(known[name].defaults if name in known else {}), **(combo.get(name) or {})}
        enabled = settings.get("enabled", False)
        if all_on is not None and (name in all_on) != usual["enabled"]:
            changed[f"{name}.enabled"] = name in all_on
        for parameter, value in settings.items() if enabled else ():
            if parameter != "enabled" and usual.get(parameter, ...) != value:
                changed[f"{name}.{parameter}"] = value
    return [shlex.quote(f"optimizations.{name}={_override(value)}") for name, value in changed.items()]


def _all_on(run: Run) -> set[str] | None:
    """What the command switched on, of which a sweep's job has a part; None where that is not known, or nothing."""
    if run.job.get("sweep"):
        members = run.job.get("members")
        return {*members, *run.job["left_out"]} if members else None
    return {name for name, settings in (run.job.get("optimizations") or {}).items() if settings.get("enabled")}


def _usual(file: Path) -> dict[str, Any]:
    """A group's settings as its file has them, over those of the files beside it that its `defaults` name."""
    if not file.is_file():
        return {}
    settings = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    below: dict[str, Any] = {}
    for name in settings.pop("defaults", []):
        below |= _usual(file.with_name(f"{name}.yaml"))
    return {**below, **settings}


def _flat(where: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{where}.{name}", value)
        else:
            yield f"{where}.{name}", value


def _override(value: Any) -> str:
    """A value in Hydra's grammar. Of a file its name alone: where it lies is this machine's own."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_override(item)}" for name, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
