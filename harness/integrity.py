"""Results are evidence: whether a run's files are still those that the run wrote.

`summary.json` lists every other file of its folder with its SHA-256 in `files`, and holds a digest of itself. The
job seals its folder so when it ends. Scoring again writes new scores and a new summary, and nothing else: it carries
the other hashes on, so that an edited row does not become true by being scored, and names in `replaces` the digest of
the summary that it replaced.

This finds what was changed by hand or by accident. It is no signature: whoever means to deceive can seal again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"
REWRITTEN = ("scores.jsonl",)
"""What scoring a run again replaces, beside the summary."""
ARCHIVE = "audio.zip"
"""The clips of a run that is judged elsewhere (`harness.later`)."""
NOT_KEPT = ("audio/", ARCHIVE)
"""Clips may be left behind when a run is kept for reference; its figures do not need them."""

UNVERIFIED = "unverified: its summary holds no hashes of its files, so a changed row could not be told."


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run, by its path in the folder; the summary and unfinished files are left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: _sha256(path) for name, path in names.items() if name != SUMMARY}


def carried_hashes(folder: Path, sealed: Mapping[str, str]) -> dict[str, str]:
    """The hashes after scoring again: those of `sealed` stand, but for what scoring writes; none if there were none."""
    written = [name for name in REWRITTEN if sealed and (folder / name).is_file()]
    return {**sealed, **{name: _sha256(folder / name) for name in written}}


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a summary's content, its `digest` left out; the same however the file is laid out."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def problems(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What was changed since the folder was sealed, one sentence each; `record` is its summary as read from JSON.

    Empty for a folder that is as it was, and for one without hashes: see `notes`.
    """
    sealed, found = record.get("files") or {}, []
    if record.get("digest") and record["digest"] != digest(record):
        found.append("summary.json was edited after the run: it is not what its own digest says.")
    for name, sha in sealed.items():
        path = folder / name
        if not path.is_file():
            found += [] if name.startswith(NOT_KEPT) else [f"{name} is missing: the run wrote it."]
        elif _sha256(path) != sha:
            found.append(f"{name} was changed after the run: its hash is not the one in summary.json.")
    if sealed:
        added = [name for name in REWRITTEN if name not in sealed and (folder / name).is_file()]
        found += [f"{name} was added after the run: summary.json does not know it." for name in added]
    return found


def left_behind(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The clips that were sealed with the folder and are not there any more."""
    if (folder / ARCHIVE).is_file():
        return []
    clips = [name for name in record.get("files") or {} if name.startswith(NOT_KEPT)]
    return [name for name in clips if not (folder / name).is_file()]


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader should know although nothing is wrong with it."""
    return [] if record.get("files") else [UNVERIFIED]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
