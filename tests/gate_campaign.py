"""How often does the gate cry wolf, and does it find what was planted?

    python tests/gate_campaign.py results/gates --identical 30 --slower 10 --errors 10 --out docs/gate_campaign.json

Each gate is what a user would type: a run of the miniature, and `python -m harness gate` over it by the default rules.
Measured are identical code against itself, every stage 10 % slower, and one word in twenty left out
(`tests/planted_gate.py`). `--at-once N` runs so many gates side by side, each held to two cores of its own.

The folder keeps a line for each gate in gates.jsonl, so the same command goes on where it was interrupted.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORES = 2
"""Of each gate."""
PLANTED = ["plugin_modules=[planted_gate]"]
KINDS = {
    "identical": (["+combo=baseline"], 0),
    "slower": ([*PLANTED, "optimizations.planted_slowdown.enabled=true"], 1),
    "errors": ([*PLANTED, "optimizations.planted_errors.enabled=true"], 1),
}
"""Of each kind of gate, what is measured, and the exit code that is right."""


def main() -> None:
    options = _parser().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "gates.jsonl"
    done = {(row["kind"], row["number"]) for row in _read(kept)}
    wanted = [(kind, number) for kind in KINDS for number in range(getattr(options, kind))]
    with ThreadPoolExecutor(options.at_once, initializer=_hold, initargs=(_places(options.at_once),)) as pool:
        gates = [pool.submit(one_gate, options, *gate) for gate in wanted if gate not in done]
        try:
            for gate in as_completed(gates):
                row = gate.result()
                with kept.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(" ".join(f"{key}={row[key]}" for key in LINE), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    table = summary(_read(kept), options)
    print(json.dumps(table["kinds"], indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(table, indent=1) + "\n")


def _places(n: int) -> queue.SimpleQueue[set[int]]:
    """Cores for each of `n` gates side by side, no core twice. Exits if there are too few of them."""
    cores = sorted(os.sched_getaffinity(0))
    if n > 1 and n * CORES > len(cores):
        sys.exit(f"--at-once {n} needs {n * CORES} cores, and there are {len(cores)}")
    places: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for index in range(n):
        places.put(set(cores[CORES * index : CORES * (index + 1)]))
    return places


def _hold(places: queue.SimpleQueue[set[int]]) -> None:
    """Hold the calling thread, and whatever it starts, to one of the places."""
    os.sched_setaffinity(0, places.get())


def one_gate(options: argparse.Namespace, kind: str, number: int) -> dict[str, Any]:
    """Measure and judge once. Raises RuntimeError if the measuring itself fails."""
    folder = options.folder / f"{kind}-{number:02}"
    shutil.rmtree(folder, ignore_errors=True)  # what an interruption left
    folder.mkdir()
    paths = [f"results_dir={folder.resolve()}/results", f"reports_dir={folder.resolve()}/reports"]
    started = time.monotonic()
    measured = _run(folder / "measure.log", "run_sweep.py", *KINDS[kind][0], *options.settings, *paths)
    measured_s = time.monotonic() - started
    if not list(folder.glob("results/*/summary.json")):
        raise RuntimeError(
            f"{kind} {number} was not measured: {folder}/measure.log says why\n{measured.stdout[-2000:]}"
        )
    judged = _run(folder / "gate.log", "-m", "harness", "gate", f"{folder}/results", "--json")
    seconds = time.monotonic() - started
    if not judged.stdout.strip():
        raise RuntimeError(f"{kind} {number} was not judged: {folder}/gate.log says why")
    (run,) = json.loads(judged.stdout)["runs"]
    environment = json.loads(next(folder.glob("results/*/environment.json")).read_text())
    row = {
        "kind": kind,
        "number": number,
        "exit_code": judged.returncode,
        "measured_s": round(measured_s),
        "seconds": round(seconds),
        "repetitions": len(list(folder.glob("results/*/repeats/*/summary.json"))),
        "load": round(os.getloadavg()[1], 1),
        "findings": run["findings"],
        "notes": run["notes"],
        "commit": run["commit"],
        "cpu": environment["cpu"]["model"],
        "packages": environment["packages"],
    }
    if not options.keep:
        shutil.rmtree(folder)
    return row


def _run(log: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("w") as errors, tempfile.TemporaryDirectory(prefix="gate-") as own:
        environment["TMPDIR"] = own  # where jobs take turns on the one CPU: those beside it have cores of their own
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


# -- the table -----------------------------------------------------------------------------------------------------

LINE = ("kind", "number", "exit_code", "measured_s", "seconds", "repetitions", "load")


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Counts by kind and exit code, and each gate in a line."""
    return {
        "settings": options.settings,
        "at_once": options.at_once,
        "cores_of_each": CORES,
        "commits": sorted({row["commit"] for row in rows}),
        "cpus": sorted({str(row["cpu"]) for row in rows}),
        "packages": rows[-1]["packages"] if rows else {},
        "kinds": {kind: _counts([row for row in rows if row["kind"] == kind], KINDS[kind][1]) for kind in KINDS},
        "gates": [_line(row) for row in sorted(rows, key=lambda row: (list(KINDS).index(row["kind"]), row["number"]))],
    }


def _counts(rows: Sequence[dict[str, Any]], right: int) -> dict[str, Any]:
    codes = {str(code): sum(row["exit_code"] == code for row in rows) for code in range(4)}
    seconds = sorted(row["seconds"] for row in rows)
    return {
        "gates": len(rows),
        "right": codes[str(right)],
        "exit_codes": codes,
        "repetitions": sum(row["repetitions"] for row in rows),
        "seconds_median": seconds[len(seconds) // 2] if seconds else None,
        "seconds_most": seconds[-1] if seconds else None,
    }


def _line(row: dict[str, Any]) -> dict[str, Any]:
    findings = {finding["subject"]: _short(finding) for finding in row["findings"]}
    return {**{key: row[key] for key in LINE}, "findings": findings}


def _short(finding: dict[str, Any]) -> list[Any]:
    """The outcome, and with it the interval or, where there is none, the reason."""
    change = finding["change"]
    if change and change["low"] is not None:
        return [finding["outcome"], round(change["low"], 4), round(change["high"], 4)]
    return [finding["outcome"], *([finding["reason"]] if finding["reason"] else [])]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="each on two cores of its own")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders, with their clips")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table")
    default = ["workload=gate", "measure=gate"]
    parser.add_argument("--settings", nargs="+", default=default, metavar="NAME=VALUE", help="of run_sweep.py")
    return parser


if __name__ == "__main__":
    main()
