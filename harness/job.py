"""A paired experiment: the baseline and one combo, side by side on one device.

    load       each in its own process; both stay alive, and while one works the other is idle
    first      the first call of each, on equal work
    warmup     the same call a few times more, on its way to the steady state
    quality    every text with every seed, running free; this also counts the baseline's tokens
    speed      every text held to the baseline's token count, round after round, the order flipping (ABBA)
    evidence   what each optimization shows for having been active
    scoring    WER and similarity of the quality pass, once nothing is timed any more

Whatever happens to a child becomes rows and records of the run's folder. What was measured before, and what
the other child measures after, is kept.

A call speaks one utterance or, in the scenario `offline`, all of the workload at once. The unmodified pipeline takes
them one after the other anyway, so that it would only take longer: it speaks a few of them, and figures are compared
per second of audio.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from harness import environment, measure, stats
from harness.config import JobSpec, Toggles
from harness.errors import UserError
from harness.plugins import import_catalogue
from harness.quality.scoring import check_judges, score_run
from harness.results import BASELINE, PASSES, Measurement, RunFolder, Summary
from harness.summarize import build_summary
from harness.worker import ChildError, Order, Setup, Worker
from harness.workload import OFFLINE, Item, Workload, load_workload

UNTRAINED = "the checkpoint's weights come from a seed, so it cannot speak"


class Progress(Protocol):
    """Is told what goes on: the phase in words, utterances done, utterances in all."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...


def run(spec: JobSpec, results: Path, progress: Progress, started: float | None = None) -> Summary:
    """Measure one combo against the baseline and leave a run's folder under `results`, its summary included.

    `started` is when the job's clock began (`time.monotonic`), for a caller that has prepared before. Raises
    UserError for what a user can put right. Whatever it raises, a folder is left only if something was measured.
    """
    device = resolve_device(spec.config["device"])
    workload = load_workload(spec.config["workload"])
    if workload.scenario == OFFLINE and (few := spec.config["measure"]["offline_baseline_items"]) < 1:
        raise UserError(f"measure.offline_baseline_items={few}: the baseline has to speak 1 utterance or more")
    progress(f"waiting until no other job measures on {device}", 0, 0)
    asked = time.monotonic()
    with measure.alone_on(device):
        waited_s = time.monotonic() - asked  # for another job, so no part of this one
        ledger = Ledger(None if started is None else started + waited_s)
        folder = RunFolder.create(results, spec.combo, spec.config["pipeline"]["name"])
        folder.write_job(spec.config)
        experiment = Experiment(spec, workload, device, folder, ledger, progress)
        try:
            experiment.measure()
            experiment.close()
            experiment.score()
        except BaseException:  # a user's mistake, Ctrl-C, or a defect
            experiment.close()
            if experiment.spoken:  # what was measured is kept
                experiment.summarize()
            else:
                shutil.rmtree(folder.path)
            raise
        return experiment.summarize()


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where PyTorch sees one, else cpu. Raises UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or not index):
        raise UserError(f"device={device}: there is auto, cpu, cuda and cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; try device=cpu")
    return device


class Ledger:
    """Where a job's time goes: loading, measured calls, evidence (probes in the child), scoring.

    All the rest is orchestration: talking to the children, writing files, waiting, summing up.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = started if started is not None else time.monotonic()
        self.loading_s = time.monotonic() - self.started  # the packages, which the forkserver imports meanwhile
        self.measured_s = 0.0
        self.evidence_s = 0.0
        self.scoring_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def book(self, account: str) -> Iterator[None]:
        """Add the time spent inside to one of the accounts."""
        start = time.monotonic()
        try:
            yield
        finally:
            setattr(self, account, getattr(self, account) + time.monotonic() - start)

    def read(self) -> dict[str, float]:
        job_s = self.elapsed_s
        booked_s = self.loading_s + self.measured_s + self.evidence_s + self.scoring_s
        orchestration_s = max(0.0, job_s - booked_s)
        return {
            "job_s": job_s,
            "loading_s": self.loading_s,
            "measured_s": self.measured_s,
            "evidence_s": self.evidence_s,
            "scoring_s": self.scoring_s,
            "orchestration_s": orchestration_s,
            "orchestration_share": orchestration_s / job_s,
        }


class Experiment:
    """One job on its way: two workers, the files they fill, and what is known so far."""

    def __init__(
        self,
        spec: JobSpec,
        workload: Workload,
        device: str,
        folder: RunFolder,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.spec, self.device = spec, device
        self.folder, self.ledger, self.progress = folder, ledger, progress
        self.settings = spec.config["measure"]
        self.items, self.seeds = list(workload.items), list(workload.seeds)
        self.offline = workload.scenario == OFFLINE
        self.toggles: dict[str, Toggles] = {BASELINE: {}, spec.combo: spec.toggles}
        self.workers: dict[str, Worker] = {}
        self.children: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in self.toggles}
        self.statuses: dict[str, dict[str, Any]] = {}
        self.pinned: dict[Item, int] = {}
        self.warnings: list[str] = []
        self.plan = {name: dict.fromkeys(PASSES, 0) for name in self.toggles}
        self.spoken = 0

    # -- the phases ---------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Everything that needs the children. Raises UserError for what they cannot be given."""
        if not self._load():
            return
        self._make_plan()
        if self._speaks():
            check_judges(self.spec.config["quality"])
        watch = measure.CpuWatch([worker.pid for worker in self.workers.values()])
        states = [self._device_state()]
        self._first_calls()
        if self._speaks():
            self._quality_pass()
        for _ in self._speed_rounds():
            states.append(self._device_state())
        self._collect_evidence()
        self.warnings += watch.warnings() if self.device == "cpu" else []
        self.warnings += measure.state_warnings(states, n_own=len(self.workers))

    def close(self) -> None:
        """Leave no child behind."""
        for worker in self.workers.values():
            worker.stop()

    def score(self) -> None:
        """WER and similarity of what the quality pass left; nothing is timed any more, so on all cores."""
        if self.plan[BASELINE]["quality"]:
            self._report("scoring")
            with self.ledger.book("scoring_s"):
                score_run(self.folder, self.spec.config["quality"])

    def summarize(self) -> Summary:
        """Write the side files and, last, the summary, of whatever is there."""
        self._write_records()
        self.folder.write_json("timing.json", {**self.ledger.read(), "warnings": self.warnings})
        summary = build_summary(self.folder)
        timing = self.ledger.read()  # once more: now the summary's own time is in it
        self.folder.write_json("timing.json", {**timing, "warnings": self.warnings})
        summary.timing = {name: timing[name] for name in summary.timing}
        self.folder.write_summary(summary)
        return summary

    def _write_records(self) -> None:
        """What is known of the children; also before the end, which not every run lives to see."""
        self.folder.write_json("children.json", self.children)
        self.folder.write_json("optimizations.json", {self.spec.combo: self._all_statuses()})

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Load one variant after the other; False if one is missing, for the other could not be paired."""
        device = {"name": self.device}
        for name in self.toggles:
            self._report(f"loading {name}")
            with self.ledger.book("loading_s"):
                self.workers[name] = Worker(self._setup(name))
                loaded = self._ask(name, "load", limit_s=self.settings["load_limit_s"])
            if loaded is None:
                break
            device, voices = loaded.pop("device"), loaded.pop("voices")
            self.statuses = loaded.pop("optimizations")
            ready_s = loaded["imports_s"] + loaded["load_s"]  # as if it had imported the packages for itself
            self.children[name] |= loaded | {"process_to_first_utterance_s": ready_s}
        self.folder.write_json("environment.json", environment.describe(self.spec.config_hash, device))
        if loaded is None:
            for child in self.children.values():
                if child["status"] == "ok":
                    child |= {"status": "failed", "error": "not measured: the other process could not load"}
            return False
        self._write_records()
        self.items, replaced = fit_voices(self.items, voices)
        self.warnings += replaced
        return True

    def _setup(self, name: str) -> Setup:
        pipeline, modules = self.spec.config["pipeline"], self.spec.config["plugin_modules"]
        catalogue = import_catalogue(modules)
        variables: dict[str, str] = {}
        for plugin, params in self.toggles[name].items():
            variables |= catalogue.create(plugin, params).environment()
        return Setup(
            variant=name,
            folder=self.folder.path,
            loader=pipeline["loader"],
            loader_arguments={key: pipeline[key] for key in ("name", "checkpoint_dir", "seed")},
            device=self.device,
            plugins=self.toggles[name],
            plugin_modules=tuple(modules),
            environment=variables,
            threads=pipeline["threads"],
        )

    def _speaks(self) -> bool:
        return all(child.get("trained") for child in self.children.values())

    def _make_plan(self) -> None:
        """Rows expected per variant and pass, and the token counts that are known before anything has spoken."""
        for name, plan in self.plan.items():
            n, spoken = len(self._own_items(name)), self._speaks()
            plan["first"] = 1
            plan["warmup"] = self.settings["warmup_calls"] * (1 + n if self.offline else 1)
            plan["speed"] = n * self._least_rounds()
            plan["quality"] = n * len(self.seeds) if spoken else 0
        if self.offline:
            self.warnings.append(self._about_the_batch())
        if not self._speaks():
            per_character = self.settings["tokens_per_character"]
            self.pinned = {item: max(1, round(per_character * len(item.text))) for item in self.items}
            for child in self.children.values():
                child["quality_unmeasured_reason"] = UNTRAINED
        if tokens := self.settings["pinned_tokens"]:
            self.pinned = dict.fromkeys(self.items, tokens)
        self.folder.write_json("plan.json", self.plan)

    def _own_items(self, name: str) -> list[Item]:
        """What a variant speaks: everything, but in an offline batch only a part of it without optimizations."""
        few = self.offline and not self.toggles[name]
        return self.items[: self.settings["offline_baseline_items"]] if few else self.items

    def _turns(self) -> list[dict[str, list[Item]]]:
        """The calls of one round: what each variant speaks at once, one variant right after the other."""
        if self.offline:
            return [{name: self._own_items(name) for name in self.toggles}]
        return [{name: [item] for name in self.toggles} for item in self.items]

    def _least_rounds(self) -> int:
        """A batch is one measurement, however many utterances it has, and an interval takes several."""
        least = self.settings["min_rounds"]
        return max(least, stats.MIN_PAIRS) if self.offline else least

    def _about_the_batch(self) -> str:
        sizes = [f"{name} speaks {len(self._own_items(name))}" for name in self.toggles]
        return (
            f"offline: in one call {' and '.join(sizes)} utterances (measure.offline_baseline_items), the baseline one "
            "after the other. RTF is per second of audio, and each call's time is counted once. Quality is compared on "
            "what both spoke."
        )

    # -- the passes ---------------------------------------------------------------------------------------------------

    def _first_calls(self) -> None:
        """The first call and the warm-up calls: one text, the combo held to what the baseline said."""
        first, pins = self.items[0], dict(self.pinned)
        for number in range(1 + self.settings["warmup_calls"]):
            for position, name in enumerate(self.toggles):
                step = "warmup" if number else "first"
                for item, row in self._speak(name, step, [first], pins=pins, round=number, position=position):
                    if row.n_tokens and not number:
                        pins.setdefault(item, row.n_tokens)
                        self.children[name]["process_to_first_utterance_s"] += row.generation_time_s

    def _quality_pass(self) -> None:
        """Every text with every seed, each variant stopping by itself. The first seed's count will be pinned."""
        for seed, turn in product(self.seeds, self._turns()):
            for position, (name, items) in enumerate(turn.items()):
                for item, row in self._speak(name, "quality", items, seed=seed, position=position, keep=True):
                    if row.n_tokens and (name == BASELINE or item not in turn[BASELINE]):
                        self.pinned.setdefault(item, row.n_tokens)

    def _warm_batches(self) -> None:
        """A batch has shapes of its own to prepare: the speed pass's calls, before they count."""
        for number in range(self.settings["warmup_calls"]):
            for position, (name, items) in enumerate(self._turns()[0].items()):
                self._speak_pinned(name, "warmup", items, round=number, position=position)

    def _speed_rounds(self) -> Iterator[int]:
        """Every text in every round, equal work for both, neighbours in time, the order flipping.

        Rounds are added while the budget lasts; the minimum is kept whatever it takes.
        """
        if self.offline:
            self._warm_batches()
        start, least = time.monotonic(), self._least_rounds()
        for number in range(max(least, self.settings["max_rounds"])):
            spent = time.monotonic() - start
            if number >= least and spent * (number + 1) / number > self.settings["budget_s"]:
                break
            for name, plan in self.plan.items():
                plan["speed"] = len(self._own_items(name)) * max(number + 1, least)
            self.folder.write_json("plan.json", self.plan)
            for index, turn in enumerate(self._turns()):
                names = list(turn) if (number + index) % 2 == 0 else list(turn)[::-1]
                for position, name in enumerate(names):
                    self._speak_pinned(name, "speed", turn[name], round=number, position=position)
            yield number

    def _speak_pinned(self, name: str, step: str, items: Sequence[Item], round: int, position: int) -> None:
        """In one call, the items whose number of tokens is known, held to it."""
        if known := [item for item in items if item in self.pinned]:
            self._speak(name, step, known, pins=self.pinned, round=round, position=position)

    def _speak(
        self,
        name: str,
        step: str,
        items: Sequence[Item],
        *,
        seed: int | None = None,
        pins: Mapping[Item, int] | None = None,
        round: int = 0,
        position: int = 0,
        keep: bool = False,
    ) -> list[tuple[Item, Measurement]]:
        """The items in one call, held to the numbers of tokens in `pins` if all are there, and their rows.

        Nothing once the variant's process has ended.
        """
        if not self.workers[name].alive:
            return []
        self._report(f"{step} pass, {name}" if step in ("speed", "quality") else f"{step} call, {name}")
        seed = self.seeds[0] if seed is None else seed
        tokens = [pins.get(item) if pins else None for item in items]
        if None in tokens:
            tokens = [None] * len(items)
        clips = [self.folder.clip(name, item.text_id, item.voice, seed) for item in items]
        orders = [
            Order(item.text, item.voice, seed, n_tokens, str(clip) if keep else None)
            for item, n_tokens, clip in zip(items, tokens, clips, strict=True)
        ]
        started_s = self.ledger.elapsed_s
        answers = self._ask(name, "speak", orders, limit_s=self.settings["call_limit_s"] * len(items))
        if answers is None:
            lost = {"status": "failed", "error": self.children[name]["error"], "batch_size": len(items)}
            wall_s = (self.ledger.elapsed_s - started_s) / len(items)
            answers = [lost | {"wall_s": wall_s} for _ in items]
        rows = []
        for item, order, answer in zip(items, orders, answers, strict=True):
            self.ledger.measured_s += answer.pop("wall_s")
            row = Measurement(
                variant=name,
                pass_name=step,
                text_id=item.text_id,
                text=item.text,
                voice=item.voice,
                seed=seed,
                round=round,
                position=position,
                repeat=round,
                pinned_tokens=order.n_tokens,
                started_s=started_s,
                text_sha=item.text_sha,
                **answer,
            )
            self.folder.add_measurement(row)
            self.spoken += 1
            rows.append((item, row))
        return rows

    # -- talking to the children --------------------------------------------------------------------------------------

    def _ask(self, name: str, method: str, *arguments: Any, limit_s: float) -> Any:
        """The child's answer; None if it failed. Its record says so where that was the end of the variant."""
        try:
            return self.workers[name].ask(method, *arguments, limit_s=limit_s)
        except ChildError as error:
            if method == "load" or not self.workers[name].alive:
                self.children[name] |= {"status": "failed", "error": str(error)}
            return None

    def _device_state(self) -> dict[str, Any]:
        alive = next((name for name, worker in self.workers.items() if worker.alive), None)
        return (self._ask(alive, "state", limit_s=self.settings["call_limit_s"]) or {}) if alive else {}

    def _collect_evidence(self) -> None:
        if self.workers[self.spec.combo].alive:
            with self.ledger.book("evidence_s"):
                shown = self._ask(self.spec.combo, "evidence", limit_s=self.settings["call_limit_s"])
            self.statuses = shown or self.statuses

    def _all_statuses(self) -> dict[str, dict[str, Any]]:
        """Of every optimization in the catalogue, also those that are off or whose process failed."""
        lost = {
            "enabled": True,
            "status": "failed",
            "reason": "its process failed while loading",
            "evidence": {},
        }
        off = {"enabled": False, "status": "off", "reason": None, "evidence": {}}
        names = import_catalogue(self.spec.config["plugin_modules"]).names()
        return {name: self.statuses.get(name, lost if name in self.spec.toggles else off) for name in names}

    def _report(self, phase: str) -> None:
        self.progress(phase, self.spoken, sum(sum(plan.values()) for plan in self.plan.values()))


def fit_voices(items: list[Item], known: list[str]) -> tuple[list[Item], list[str]]:
    """The items with voices that the pipeline has, and warnings about those it replaced.

    A workload names the miniature's voices; a checkpoint with a single voice of its own speaks them all with it.
    Raises UserError for a voice that is neither built in nor a reference clip.
    """
    fitted: dict[Item, None] = {}
    warnings: dict[str, None] = {}
    for item in items:
        voice = item.voice
        if voice not in known and not Path(voice).is_file():
            if Path(voice).suffix or len(known) != 1:
                raise UserError(
                    f"voice {voice!r} is neither built in ({', '.join(known)}) nor the path of a reference clip: "
                    "correct workload.voices"
                )
            warnings[f"the checkpoint has no voice {voice!r}: its own voice, {known[0]}, spoke instead"] = None
            item = replace(item, voice=known[0])
        fitted[item] = None
    return list(fitted), list(warnings)
