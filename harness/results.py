"""Result files: what a run writes, how it is read back, and what makes it unreadable.

A run is a folder, `results/<date>-<time>-<combo>-<pipeline>/`:

    job.yaml            the resolved configuration
    environment.json    what ran where
    plan.json           rows expected: {"baseline": {"first": 1, "warmup": 2, "speed": 12, "quality": 9}, ...}
    utterances.jsonl    one `Measurement` per variant, text, voice, seed, repeat and pass
    audio/<variant>/    the quality pass's clips, 16-bit PCM
    scores.jsonl        one `Score` per clip of the quality pass
    children.json       per variant: load time, model memory, status and error of its process
    optimizations.json  per variant and optimization: enabled, status, reason, evidence
    fidelity.json       how far each stage is from the reference's on the reference's own inputs (`quality.stages`)
    conditions.json     of each round: the device's clocks, temperature and throttling, and foreign load
    requests.json       the seed of the requests' own seeds and lengths: `measure.requests_seed` repeats them
    timing.json         where the job's own time went
    summary.json        a `Summary`: written last, atomically, only if it satisfies the schema, and with a hash of
                        every other file (`harness.integrity`)

Rows are flushed one by one, so a crash loses at most the row in flight; a reader meets that row as an
unfinished last line, drops it and says so. A number that is not finite is stored as null: JSON has no
NaN, and a mean over one would hide it.

`harness.summarize` turns such a folder into its summary.
"""

import datetime
import functools
import hashlib
import json
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml

from harness import integrity, shapes
from harness.clips import is_clip
from harness.errors import UserError

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)
SCHEMA_FILE = Path(__file__).parent / "schema" / "summary.schema.json"
BASELINE = "baseline"
MERGED = "merged.json"  # beside the folders of several hosts (`harness.merge`)
FAILURES = "failures.txt"  # of a sweep: why some of its jobs left no results
PASSES = ("first", "warmup", "speed", "quality", "repeat", "load")
NO_EVIDENCE = "no evidence was taken yet"  # of an optimization that was applied, and asked for nothing since
SIMILARITY = "sim_"  # every similarity metric is named after its speaker model: sim_resemblyzer, ...


# ---------------------------------------------------------------------------------------------- rows


@dataclass(kw_only=True)
class Measurement:
    """One synthesis: a row of utterances.jsonl. Times in seconds, memory in MB (10^6 bytes), level in dBFS.

    `pass_name` is one of PASSES (the column is called "pass", a Python keyword). `pinned_tokens` is the
    number of speech tokens the run was held to, None when it ran free. `position` tells whether the
    variant ran first (0) or second (1) in its round, `process` which pair of processes it was. A failed row keeps its
    error; its figures are None. `language` is the text's own, None where it has the pipeline's.

    `generation_time_s` is by the child's clock and `parent_time_s` by the experiment's, from question to answer;
    figures go by `time_s`, the longer. `flaw` says what is wrong with the audio. `silent_share`, `repetition` (of
    itself), `likeness` and `stretched_likeness` (to an earlier clip of the same item), `unlikeness` (to the reference's
    earlier ones) and `apart` (from the other variant's of this request) are what `harness.hearing` finds in it.
    `counts` holds what the process held after the call, `energy_j` what the whole GPU used in it. `audio_sha` fixes a
    kept clip. `chunks` of a stream are pairs of when the parent had one and how long it plays.

    A row of the load pass is a request among others: `load` is how they came (harness.load), "closed" or "open",
    `load_size` how many there were at a time, `came_s` when this one came. A failed one had no whole answer in time.

    A call may speak several utterances at once: `batch_size` of them. Each has its own row, whose times are its
    share of the call's, in proportion to its audio; so a call's time is counted once, however its rows are summed.
    """

    variant: str
    pass_name: str
    text_id: str
    text: str
    voice: str
    seed: int
    process: int = 0
    round: int = 0
    position: int = 0
    repeat: int = 0
    status: str = "ok"
    error: str | None = None
    generation_time_s: float | None = None
    parent_time_s: float | None = None
    audio_s: float | None = None
    n_tokens: int | None = None
    pinned_tokens: int | None = None
    n_segments: int | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    batch_size: int = 1
    hit_token_cap: bool = False
    eos: bool | None = None
    peak_memory_mb: float | None = None
    memory_kind: str = "rss"
    memory: dict[str, float] = field(default_factory=dict)
    audio: str | None = None
    audio_sha: str | None = None
    chunks: list[list[float]] = field(default_factory=list)
    load: str | None = None
    load_size: float | None = None
    came_s: float | None = None
    level_dbfs: float | None = None
    silent: bool = False
    non_finite: bool = False
    silent_share: float | None = None
    repetition: float | None = None
    likeness: float | None = None
    stretched_likeness: float | None = None
    unlikeness: float | None = None
    apart: float | None = None
    flaw: str | None = None
    counts: dict[str, float] = field(default_factory=dict)
    energy_j: float | None = None
    started_s: float | None = None
    text_sha: str = ""
    language: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def time_s(self) -> float | None:
        """Seconds that both clocks support: the longer of the two, for a child's alone is only its word."""
        return max((seconds for seconds in (self.generation_time_s, self.parent_time_s) if seconds), default=None)

    @property
    def work(self) -> tuple[str, str, int]:
        """What was asked for; two variants are compared on the same work."""
        return self.text_id, self.voice, self.seed

    @property
    def pair(self) -> tuple[str, str, int, int, int, int]:
        """What the other variant's row of the same round shares with this one."""
        return *self.work, self.round, self.repeat, self.process

    @property
    def call(self) -> tuple[Any, ...]:
        """Equal for the rows of one variant that one call of the speed pass spoke."""
        return (self.process, self.round, self.repeat) if self.batch_size > 1 else self.pair

    def to_row(self) -> dict[str, Any]:
        row = asdict(self)
        return {"variant": row.pop("variant"), "pass": row.pop("pass_name"), **row}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Raises TypeError or KeyError for a row that is not a measurement."""
        row = dict(row)
        return cls(pass_name=row.pop("pass"), **row)


@dataclass(kw_only=True)
class Score:
    """How one clip was judged: a row of scores.jsonl.

    `pass_name` is the pass that made the clip: "quality", or "speed" for a clip that was timed (the column is called
    "pass"). `similarity` maps the metric's full name (sim_resemblyzer, ...) to a cosine; in the file the names are
    columns. `watermark` is what the watermark's own detector said of the clip, from 0 (none) to 1; None where it was
    not asked. `missing` marks a clip that was absent, silent or not finite, `reason` says which.

    `text` and `heard` are the two sides as they came, `reference` and `hypothesis` as they were compared. `cer` is the
    character error rate. `tail_insertions` are words spoken after the text was over, `tail_deletions` those of its end
    that were never said. `voiced_s` is how long somebody speaks in the clip, `hit_token_cap` whether it was cut off at
    the model's limit.
    """

    variant: str
    text_id: str
    voice: str
    seed: int
    pass_name: str = "quality"
    audio: str | None = None
    text: str = ""
    heard: str = ""
    reference: str = ""
    hypothesis: str = ""
    wer: float | None = None
    cer: float | None = None
    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    tail_insertions: int = 0
    tail_deletions: int = 0
    seconds_per_character: float | None = None
    voiced_s: float | None = None
    hit_token_cap: bool = False
    similarity: dict[str, float | None] = field(default_factory=dict)
    watermark: float | None = None
    missing: bool = False
    reason: str | None = None

    @property
    def work(self) -> tuple[str, str, int]:
        return self.text_id, self.voice, self.seed

    def figure(self, metric: str) -> float | None:
        """The word error rate, the watermark or the similarity of that name."""
        return self.similarity.get(metric) if metric.startswith(SIMILARITY) else getattr(self, metric)

    def to_row(self) -> dict[str, Any]:
        row = _with_similarity_columns(asdict(self))
        return {"variant": row.pop("variant"), "pass": row.pop("pass_name"), **row}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Raises TypeError for a row that is not a score."""
        similarity = {name: value for name, value in row.items() if name.startswith(SIMILARITY)}
        rest = {name: value for name, value in row.items() if name not in similarity}
        return cls(similarity=similarity, pass_name=rest.pop("pass", "quality"), **rest)


def _with_similarity_columns(row: dict[str, Any]) -> dict[str, Any]:
    similarity = row.pop("similarity")
    return {**row, **similarity}


# ------------------------------------------------------------------------------------------- summary


@dataclass(kw_only=True)
class Comparison:
    """The combo against its reference in one metric.

    `value` is combo / reference for a "ratio" (below 1: faster, smaller) and combo - reference for a
    "delta"; [low, high] is its 95 % interval from `n` pairs. None stands for not measured.

    `smallest_detectable` is the smallest true change that a run like this one gives a verdict (relative for a ratio),
    `rounds_for_threshold` the rounds that it would take to tell a change of the threshold's size from none.
    """

    kind: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    n: int
    smallest_detectable: float | None = None
    rounds_for_threshold: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            self.kind: self.value,
            "low": self.low,
            "high": self.high,
            "verdict": self.verdict,
            "n": self.n,
            "smallest_detectable": self.smallest_detectable,
            "rounds_for_threshold": self.rounds_for_threshold,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        kind = "ratio" if "ratio" in record else "delta"
        rest = {name: value for name, value in record.items() if name != kind}
        return cls(kind=kind, value=record[kind], **rest)


@dataclass(kw_only=True)
class Variant:
    """One variant's own figures, absolute and therefore good on this device only.

    A variant that failed says why in `error`; `exposed`: it did run, and what it did while it was timed is why.

    Steady state (speed pass): `rtf` = sum of generation times / sum of audio seconds, its median and
    90th percentile per utterance, `generation_time_s` and `stages_s` as means per utterance, the highest
    memory peak. The first call and the warm-up calls are kept apart. `intervals` maps a metric's name to
    the 95 % interval of its figure. What a process has once is the mean over processes.

    Of the clips that were timed, the parent kept some, chosen by chance: `n_timed` of them were judged, with the error
    rate `wer_timed` and similarities under names that end in _timed. `watermark` is the share of all judged clips in
    which the watermark was found. `repeated_request_ratio`: time of a request that was spoken before, by the time that
    it took then. `growth` holds what grew call by call, per call, and "time" per round, where it counts.

    `heard` is what stands beside the mean word error rate (`figures.heard`). Of streams, `first_audio_s` is the mean
    time to the first chunk, and `streaming` what else a listener has of them (`figures.streaming`). `loaded` is what
    callers have of them under load (`figures.loaded`).
    """

    status: str = "ok"
    error: str | None = None
    exposed: bool = False
    rtf: float | None = None
    rtf_p50: float | None = None
    rtf_p90: float | None = None
    generation_time_s: float | None = None
    first_audio_s: float | None = None
    streaming: dict[str, float | None] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    first_call_s: float | None = None
    warmup_time_s: float | None = None
    load_s: float | None = None
    process_to_first_utterance_s: float | None = None
    model_memory_mb: float | None = None
    peak_memory_mb: float | None = None
    memory_kind: str = "rss"
    memory: dict[str, float] = field(default_factory=dict)
    stages_s: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    wer: float | None = None
    wer_corpus: float | None = None
    heard: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, float | None] = field(default_factory=dict)
    wer_timed: float | None = None
    watermark: float | None = None
    energy_j_per_audio_s: float | None = None
    repeated_request_ratio: float | None = None
    growth: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    n_speed: int = 0
    n_expected: int = 0
    n_scored: int = 0
    n_missing: int = 0
    n_timed: int = 0
    trained: bool = True
    quality_note: str | None = None

    def figure(self, metric: str) -> float | None:
        """The figure of that name, similarity metrics included."""
        return self.similarity.get(metric) if metric.startswith(SIMILARITY) else getattr(self, metric)

    def to_dict(self) -> dict[str, Any]:
        return _with_similarity_columns(asdict(self))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        similarity = {name: value for name, value in record.items() if name.startswith(SIMILARITY)}
        rest = {name: value for name, value in record.items() if name not in similarity}
        rest["intervals"] = {
            name: None if bounds is None else (bounds[0], bounds[1]) for name, bounds in rest["intervals"].items()
        }
        return cls(similarity=similarity, **rest)


@dataclass(kw_only=True)
class Summary:
    """One job, boiled down: summary.json. The schema beside this module is its reference."""

    run_id: str
    status: str
    combo: str
    pipeline: str
    device: str
    workload: str
    created: str
    git: str
    config_hash: str
    variants: dict[str, Variant]
    comparison: dict[str, Comparison]
    optimizations: dict[str, dict[str, Any]]
    thresholds: dict[str, float]
    timing: dict[str, float | None]
    warnings: list[str] = field(default_factory=list)
    scenario: str = "single_stream"
    against: str = BASELINE
    against_optimizations: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: int = 1
    fidelity: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    digest: str | None = None
    replaces: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def candidate(self) -> str | None:
        """The variant that is compared with the reference."""
        return next((name for name in self.variants if name != self.against), None)

    @property
    def reference(self) -> Variant:
        """The variant that the combo is compared with."""
        return self.variants[self.against]

    @property
    def enabled(self) -> list[str]:
        return [name for name, record in self.optimizations.items() if record["enabled"]]

    @property
    def active(self) -> list[str]:
        return [name for name, record in self.optimizations.items() if record["status"] == "active"]

    def distrust(self, reasons: Sequence[str]) -> None:
        """Withdraw everything: the figures stay, and nothing may be concluded from them."""
        from harness.stats import NOT_MEASURED  # with scipy, half a second that most readers of results do without

        self.status = "failed"
        self.warnings = [*reasons, *self.warnings]
        for variant in self.variants.values():
            variant.status, variant.error = "failed", reasons[0]
        self.comparison = {name: replace(record, verdict=NOT_MEASURED) for name, record in self.comparison.items()}

    def to_dict(self) -> dict[str, Any]:
        parts = {
            "variants": {name: variant.to_dict() for name, variant in self.variants.items()},
            "comparison": {name: comparison.to_dict() for name, comparison in self.comparison.items()},
        }
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return finite({"schema_version": fields.pop("schema_version"), **fields, **parts})

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Reads what an older harness wrote, too. Raises ValueError, in words, for anything the schema refuses."""
        record = _upgraded(record)
        if problem := schema_problem(record):
            raise ValueError(problem)
        parts = {
            "variants": {name: Variant.from_dict(value) for name, value in record["variants"].items()},
            "comparison": {name: Comparison.from_dict(value) for name, value in record["comparison"].items()},
        }
        return cls(**{**record, **parts})


def _upgraded(record: Any) -> Any:
    """A summary of schema version 1 as the present one has it: what it did not know is not measured."""
    if not isinstance(record, dict) or record.get("schema_version") != 1:
        return record
    absent = {"low": None, "high": None, "verdict": "not measured", "n": 0}
    comparison = {
        "load_s": absent | {"ratio": None},
        "energy_j_per_audio_s": absent | {"ratio": None},
        "wer_timed": absent | {"delta": None},
        "watermark": absent | {"delta": None},
    } | record.get("comparison", {})
    power = {"smallest_detectable": None, "rounds_for_threshold": None}
    unknown = dict.fromkeys(("wer_timed", "watermark", "energy_j_per_audio_s", "repeated_request_ratio"))
    none: dict[str, Any] = {"growth": {}, "n_timed": 0}
    return {
        **record,
        "schema_version": SCHEMA_VERSION,
        "against": BASELINE,
        "against_optimizations": {},
        "processes": 1,
        "variants": {name: unknown | none | variant for name, variant in record.get("variants", {}).items()},
        "comparison": {name: power | change for name, change in comparison.items()},
    }


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def schema_problem(record: Any) -> str | None:
    """Where and how a summary violates the schema, or None."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(record))
    return None if error is None else f"{error.json_path}: {error.message}"


# ----------------------------------------------------------------------------------------- the store


def told_commit(git: Mapping[str, Any]) -> str:
    """ "28fb469a9f77 (with local changes)", of an environment's record of git."""
    return f"{(git.get('commit') or 'unknown')[:12]}{' (with local changes)' if git.get('dirty') else ''}"


def finite(value: Any) -> Any:
    """The same value with every float that is not finite replaced by None, in containers too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of either."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def append_row(path: Path, row: dict[str, Any]) -> bytes:
    """Add one line, on disk before this returns; an unfinished line left by a crash is removed first. The line."""
    line = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
    path.touch()
    with path.open("r+b") as stream:
        stream.truncate(_end_of_last_line(stream))
        stream.seek(0, os.SEEK_END)
        stream.write(line)
        stream.flush()
    return line


def _end_of_last_line(stream) -> int:
    """Offset behind the last newline; a finished file, the usual case, costs one byte of reading."""
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return size
    stream.seek(0)
    return stream.read().rfind(b"\n") + 1


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a JSON-lines file and warnings about what could not be read.

    A missing file has no rows. An unfinished last line is what a crash leaves: dropped, with a warning.
    A broken line anywhere else means that something other than this harness wrote here: UserError.
    """
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    lines = text.split("\n") if text else []  # not splitlines: a text may hold what Unicode counts as a line's end
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number}: not JSON; the file was changed after the run. "
                    "Restore it, or measure again."
                ) from None
            return rows, [f"{path.name}: the last line is cut off (the run was interrupted); it is left out."]
    return rows, []


class RunFolder:
    """One run's folder. Creating never overwrites; opening refuses what it cannot understand."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._rows = hashlib.sha256()
        self._clips: dict[str, str] = {}

    @classmethod
    def create(cls, results: Path, combo: str, pipeline: str, now: datetime.datetime | None = None) -> Self:
        """A new folder `<date>-<time>-<combo>-<pipeline>` under `results`, numbered if that name is taken."""
        moment = (now or datetime.datetime.now()).strftime("%Y%m%d-%H%M%S")
        name = f"{moment}-{slug(combo)}-{slug(pipeline)}"
        number = 1
        while True:
            path = Path(results) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises UserError for a folder that no run wrote."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such results folder; `ls results/` shows those there are.")
        if not is_run(path):
            raise UserError(
                f"{path}: not a results folder (neither job.yaml nor summary.json in it); "
                "name a folder that run_sweep.py wrote under results/."
            )
        return cls(path)

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def utterances_file(self) -> Path:
        return self.path / "utterances.jsonl"

    @property
    def scores_file(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    def clip(self, variant: str, text_id: str, voice: str, seed: int) -> Path:
        """Where a clip that is kept goes, relative to the folder (the row's `audio`).

        A voice given as a path of a reference clip goes by its file name and, as a/me.wav is not b/me.wav, its path.
        """
        name = slug(Path(voice).stem)
        if is_clip(voice):
            name += f"-{hashlib.sha256(voice.encode()).hexdigest()[:6]}"
        return Path("audio") / slug(variant) / f"{slug(text_id)}-{name}-s{seed}.wav"

    def add_measurement(self, row: Measurement) -> None:
        self._rows.update(append_row(self.utterances_file, row.to_row()))

    def add_clip(self, row: Measurement, wave: Any, sample_rate: int) -> tuple[str, str]:
        """Keep the row's wave [samples] as 16-bit PCM: its path in the folder, and a fingerprint of the file."""
        import numpy as np
        import soundfile

        path = self.clip(row.variant, row.text_id, row.voice, row.seed)
        place = self.path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place, np.nan_to_num(wave), sample_rate, subtype="PCM_16")
        self._clips[str(path)] = _fingerprint(place)
        return str(path), self._clips[str(path)]

    def altered(self) -> str | None:
        """The first file of those that this object has written rows or clips to that is not as it left it."""
        written = self.utterances_file.read_bytes() if self.utterances_file.exists() else b""
        if hashlib.sha256(written).digest() != self._rows.digest():
            return self.utterances_file.name
        changed = (
            name
            for name, mark in self._clips.items()
            if not (self.path / name).is_file() or _fingerprint(self.path / name) != mark
        )
        return next(changed, None)

    def add_score(self, row: Score) -> None:
        append_row(self.scores_file, row.to_row())

    def measurements(self) -> tuple[list[Measurement], list[str]]:
        """All rows of utterances.jsonl, and warnings."""
        return self._typed_rows(self.utterances_file, Measurement)

    def scores(self) -> tuple[list[Score], list[str]]:
        """All rows of scores.jsonl, and warnings."""
        return self._typed_rows(self.scores_file, Score)

    def _typed_rows(self, path: Path, kind: Any) -> tuple[list[Any], list[str]]:
        """Rows with null for every figure that cannot be true, and warnings about those."""
        rows, warnings = read_rows(path)
        typed, impossible = [], []
        hints = typing.get_type_hints(kind)
        for number, row in enumerate(rows, start=1):
            try:
                row, wrong = shapes.without_impossible(row)
                typed.append(kind.from_row(row))
                problem = shapes.misfit_of_fields(typed[-1], hints)
            except (TypeError, KeyError, AttributeError) as error:
                problem = str(error)
            if problem:
                raise UserError(
                    f"{path}, line {number}: not a row that this harness writes ({problem}); it comes from another "
                    "version. Read it with that version, or measure again."
                )
            impossible += wrong
        if impossible:
            warnings.append(
                f"{path.name}: figures that cannot be are left out ({len(impossible)} of them; the first: "
                f"{impossible[0]})."
            )
        return typed, warnings

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the folder's JSON files, whole or not at all."""
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files; an absent one is empty. Raises UserError for a broken one."""
        path = self.path / name
        if not path.exists():
            return {}
        try:
            return self._of_its_shape(path, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({error}); restore the file, or measure again.") from None

    def _of_its_shape(self, path: Path, content: Any) -> dict[str, Any]:
        """Raises ValueError for a file that holds something else than this harness writes."""
        if problem := shapes.misfit(content, shapes.FILES.get(path.name, dict[str, Any])):
            raise ValueError(problem)
        return content

    def write_job(self, config: dict[str, Any]) -> None:
        """Keep the configuration, but not where on this machine its results go."""
        kept = {name: value for name, value in config.items() if name not in ("results_dir", "reports_dir")}
        write_atomically(self.path / "job.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def job(self) -> dict[str, Any]:
        """The resolved configuration; empty where only the summary was kept."""
        path = self.path / "job.yaml"
        if not path.exists():
            return {}
        try:
            return self._of_its_shape(path, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{path}: does not parse ({problem}); restore the file, or measure again.") from None

    def write_summary(self, summary: Summary) -> None:
        """The run's own, which seals its files. Raises ValueError if it violates its schema: a defect, no mistake."""
        summary.files = integrity.file_hashes(self.path)
        self._write_summary(summary)

    def rewrite_summary(self, summary: Summary) -> None:
        """In place of the run's own once its clips were scored again, or of one that a killed run could not write.

        What was sealed stays so; what never was does not become so by this. The run keeps its name, wherever its folder
        has been copied to.
        """
        earlier = self.read_json(self.summary_file.name)
        summary.run_id = earlier.get("run_id", summary.run_id)
        summary.files = integrity.carried_hashes(self.path, earlier.get("files") or {})
        summary.replaces = earlier.get("digest")
        self._write_summary(summary)

    def _write_summary(self, summary: Summary) -> None:
        summary.digest = integrity.digest(summary.to_dict())
        record = summary.to_dict()
        if problem := schema_problem(record):
            raise ValueError(f"summary.json of {summary.run_id} would violate its schema: {problem}")
        self.write_json(self.summary_file.name, record)

    def summary(self) -> Summary:
        """As it was written; of a run whose files were changed since, a failed one that says which.

        Raises UserError for a summary that is absent, damaged or of another schema version.
        """
        if not self.summary_file.exists():
            raise UserError(
                f"{self.path}: no summary.json (the run did not finish); "
                f"`python -m harness score {self.path}` makes one from the rows it left."
            )
        record = self.read_json(self.summary_file.name)
        version = record.get("schema_version") if isinstance(record, dict) else None
        if version is not None and version not in READABLE:
            raise UserError(
                f"{self.summary_file}: schema version {version}, and this harness reads "
                f"{' and '.join(map(str, READABLE))}; use the version that wrote it, or measure again."
            )
        try:
            summary = Summary.from_dict(record)
        except ValueError as error:
            raise UserError(
                f"{self.summary_file}: not a valid summary ({error}); "
                f"`python -m harness score {self.path}` rebuilds it."
            ) from None
        summary.warnings = [*integrity.notes(record), *summary.warnings]
        if changed := integrity.problems(self.path, record):
            summary.distrust(changed)
        return summary


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def is_run(path: Path) -> bool:
    return (path / "job.yaml").is_file() or (path / "summary.json").is_file()


def find_runs(paths: list[Path]) -> list[RunFolder]:
    """The runs that the paths name: a run's own folder, or a folder with runs anywhere inside (a sweep, results/).

    A run inside another run's folder belongs to that one, and is found only by its own path. In order of their names,
    which begin with the date. Raises UserError for a path with no run in it.
    """
    found: dict[Path, RunFolder] = {}
    for path in map(Path, paths):
        for run in runs_below(path) or [path]:
            found.setdefault(run.resolve(), RunFolder.open(run))
    return list(found.values())


def runs_below(path: Path) -> list[Path]:
    """Folders of runs at or below a path, those inside other runs left out; none where there is nothing."""
    inside = {file.parent for name in ("job.yaml", "summary.json") for file in path.rglob(name)}
    return sorted(run for run in inside if inside.isdisjoint(run.parents))


def slug(name: str) -> str:
    """The name with everything that is awkward in a file name replaced by a hyphen."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", name).strip("-.") or "unnamed"
