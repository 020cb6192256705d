"""What is said, in which voices, with which seeds.

A workload is a config group (`configs/workload/`) or a user's own file, `workload.file=PATH`: a text file with one
sentence a line, or YAML with a list of texts. Texts meet voices in one of two ways:

    round_robin   the voices take turns: text i is spoken by voice i modulo the number of voices
    full          every text is spoken by every voice

and are handed to the pipeline in one of four ways, the first two as MLPerf names them:

    single_stream one utterance after the other: how long does somebody wait?
    offline       all of them at once: how much can be spoken in a day?
    streaming     one after the other, in chunks as they are ready: when is the first word heard, and does it go on?
    loaded        the same, and then by several callers at a time: for how many does it stay so?

Long texts can be composed of the listed ones: `passages: {count: 64, sentences: 3}`. A text may have a language of its
own, `{id: hello, text: "Bonjour.", language: fr}`, for a multilingual pipeline.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import yaml

from harness.clips import check_clip, is_clip
from harness.errors import UserError
from harness.locations import ROOT
from harness.settings import LARGEST_SEED

MAX_CHARACTERS = 2000
"""Upstream's table of text positions has 2050 rows, and a character is at most one token."""
CROSSINGS = ("round_robin", "full")
SINGLE_STREAM, OFFLINE, STREAMING, LOADED = SCENARIOS = ("single_stream", "offline", "streaming", "loaded")


@dataclass(frozen=True)
class Item:
    """One thing to say: a text under a stable id, and the voice that says it, a built-in name or a clip's path.

    `language` None is the pipeline's.
    """

    text_id: str
    text: str
    voice: str
    language: str | None = None

    @property
    def text_sha(self) -> str:
        """A short fingerprint of the text, which tells whether two runs spoke the same words."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Workload:
    """Each item is to be said once with each seed."""

    name: str
    items: tuple[Item, ...]
    seeds: tuple[int, ...]
    scenario: str = SINGLE_STREAM
    warnings: tuple[str, ...] = ()


def load_workload(config: Mapping[str, Any]) -> Workload:
    """The workload that the config group describes; `file`, where given, takes the place of `texts`.

    Raises UserError, naming the place, for a file that is absent or does not parse, for a text that is empty, too long
    or shares its id with another, for a reference clip that no voice can be learned from, and for a missing or unknown
    setting.
    """
    file = config.get("file")
    texts = _read(file_of(file)) if file else _listed(config.get("texts"), "workload.texts")
    voices = _strings(config.get("voices"), "workload.voices")
    _check_ids(texts, file or "workload.texts")
    if passages := config.get("passages"):
        texts = _passages(texts, passages)
    warnings = [check_clip(voice) for voice in voices if is_clip(voice)]
    return Workload(
        name=str(config.get("name") or file),
        items=tuple(_cross(texts, voices, config.get("cross"))),
        seeds=_seeds(config.get("seeds")),
        scenario=_scenario(config.get("scenario")),
        warnings=tuple(warning for warning in warnings if warning),
    )


def fit_voices(items: Sequence[Item], known: Sequence[str]) -> tuple[list[Item], list[str]]:
    """The items with voices that a pipeline has, and warnings about those that were replaced.

    A workload names the miniature's voices; a checkpoint with a single voice of its own speaks them all with it.
    Raises UserError for a voice that is neither built in nor a reference clip.
    """
    fitted: dict[Item, None] = {}
    warnings: dict[str, None] = {}
    for item in items:
        voice = item.voice
        if voice not in known and not (is_clip(voice) and Path(voice).is_file()):
            if is_clip(voice) or len(known) != 1:
                file = f", and to mean the file write ./{voice}" if Path(voice).is_file() else ""
                raise UserError(
                    f"voice {voice!r} is neither built in ({', '.join(known)}) nor the path of a reference clip: "
                    f"correct workload.voices{file}"
                )
            warnings[f"the checkpoint has no voice {voice!r}: its own voice, {known[0]}, spoke instead"] = None
            item = replace(item, voice=known[0])
        fitted[item] = None
    return list(fitted), list(warnings)


@dataclass(frozen=True)
class _Text:
    text_id: str
    text: str
    language: str | None = None


def _passages(texts: Sequence[_Text], settings: Any) -> list[_Text]:
    """Passages of several texts each, called passage1, passage2 ..., of which no two are alike.

    The first ones are neighbours, beginning with each text in turn; then every second text, every third, and so on.
    """
    known = isinstance(settings, Mapping) and set(settings) == {"count", "sentences"}
    if not known or not all(isinstance(number, int) and number > 0 for number in settings.values()):
        raise UserError(f"workload.passages={settings}: expected two numbers, as in {{count: 64, sentences: 3}}")
    count, length = settings["count"], settings["sentences"]
    passages = []
    for i in range(count):
        stride = 1 + i // len(texts)
        chosen = [texts[(i + stride * j) % len(texts)] for j in range(length)]
        where = f"workload.passages, passage {i + 1}"
        if len({text.language for text in chosen}) > 1:
            raise UserError(f"{where}: its texts are of several languages; make passages of one language only")
        passage = _checked(f"passage{i + 1}", " ".join(text.text for text in chosen), where)
        passages.append(replace(passage, language=chosen[0].language))
    return passages


def _cross(texts: Sequence[_Text], voices: Sequence[str], how: Any) -> list[Item]:
    if how not in CROSSINGS:
        raise UserError(f"workload.cross={how}: there is {' and '.join(CROSSINGS)}")
    pairs = zip(texts, cycle(voices), strict=False) if how == "round_robin" else product(texts, voices)
    return [Item(text.text_id, text.text, voice, text.language) for text, voice in pairs]


# -- reading a file --------------------------------------------------------------------------------------------


def file_of(file: str) -> Path:
    """The file as the user named it, else below the project's folder, whose own workloads name it so."""
    for path in (Path(file).expanduser(), ROOT / file):
        if path.is_file():
            return path
    raise UserError(f"workload.file={file}: there is no such file; name a .txt or .yaml file")


def _read(path: Path) -> list[_Text]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".txt":
        return _from_lines(content, path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(content, path)
    raise UserError(f"{path}: a workload is a .txt file with one sentence a line, or a .yaml file")


def _from_lines(content: str, path: Path) -> list[_Text]:
    """One text a line, called line1, line2 ... after its line; blank lines only separate."""
    texts = [
        _checked(f"line{number}", line, f"{path} line {number}")
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip()
    ]
    if not texts:
        raise UserError(f"{path}: the file is empty; write one sentence a line")
    return texts


def _from_yaml(content: str, path: Path) -> list[_Text]:
    """A list of texts, or a mapping whose `texts` is one."""
    try:
        data = yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{where}: does not parse as YAML ({reason}); correct it, or use a .txt file") from None
    return _listed(data.get("texts") if isinstance(data, Mapping) else data, f"{path}, texts")


# -- checking --------------------------------------------------------------------------------------------------


def _listed(entries: Any, where: str) -> list[_Text]:
    """Texts from a list of strings, called text1, text2 ..., or of mappings with `id`, `text` and maybe `language`."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise UserError(f"{where}: expected a list of texts, as in [{{id: hello, text: Hello there.}}]")
    texts = []
    for number, entry in enumerate(entries, start=1):
        place = f"{where}, entry {number}"
        if isinstance(entry, str):
            texts.append(_checked(f"text{number}", entry, place))
        elif isinstance(entry, Mapping) and set(entry) - {"language"} == {"id", "text"} and _are_words(entry):
            text = _checked(str(entry["id"]), entry["text"], f"{place} ({entry['id']})")
            texts.append(replace(text, language=entry.get("language")))
        else:
            raise UserError(
                f"{place}: expected a sentence, or {{id: ..., text: ..., language: ...}}, of which the language may be "
                "left out; quote what YAML misreads, as it does no"
            )
    return texts


def _are_words(entry: Mapping[str, Any]) -> bool:
    """A text, and a language if there is one; YAML takes an unquoted `no` for a truth value."""
    return isinstance(entry["text"], str) and isinstance(entry.get("language", ""), str)


def _checked(text_id: str, text: str, where: str) -> _Text:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text_id):
        raise UserError(f"{where}: the id {text_id!r} names a file; use letters, digits, '.', '_' and '-'")
    text = " ".join(text.split())
    if not any(character.isalnum() for character in text):
        raise UserError(f"{where}: the text is empty or has no word in it; write something that can be said")
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: the text is too long, {len(text)} characters, and the model takes {MAX_CHARACTERS}; split it"
        )
    return _Text(text_id, text)


def _check_ids(texts: Sequence[_Text], where: str) -> None:
    repeated = [text_id for text_id, count in Counter(text.text_id for text in texts).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: the id {repeated[0]} is used more than once; give every text its own")


def _strings(values: Any, where: str) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{where}: expected a list with at least one entry, as in [rms, my_clip.wav]")
    return [str(value) for value in dict.fromkeys(values)]


def _scenario(value: Any) -> str:
    if (value or SINGLE_STREAM) not in SCENARIOS:
        raise UserError(f"workload.scenario={value}: there is {', '.join(SCENARIOS)}")
    return value or SINGLE_STREAM


def _seeds(values: Any) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(value) for value in values))
    except (TypeError, ValueError):
        seeds = ()
    if not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
        raise UserError(f"workload.seeds={values}: expected a list of whole numbers from 0 on, as in [1, 2, 3]")
    return seeds
