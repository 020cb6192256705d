"""Workloads: what the shipped ones promise, and what a user's own file may hold."""

from pathlib import Path

import pytest
import yaml

from harness.errors import UserError
from harness.locations import HELD_OUT
from harness.sampling import LANGUAGES
from harness.workload import ROOT, load_workload

CONFIGS = sorted((ROOT / "configs/workload").glob("*.yaml"))
SENTENCES = HELD_OUT.read_text().splitlines()


def shipped(name: str, **changes):
    return load_workload(yaml.safe_load((ROOT / f"configs/workload/{name}.yaml").read_text()) | changes)


def settings(**changes):
    group = {"name": "own", "file": None, "texts": ["Good morning."], "voices": ["rms"], "seeds": [1]}
    return group | {"cross": "round_robin"} | changes


def said(workload):
    return [(item.text_id, item.text, item.voice) for item in workload.items]


# -- the shipped ones


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_workload_loads_under_its_own_name(path):
    assert shipped(path.stem).name == path.stem


def test_standard_speaks_the_held_out_sentences_in_four_voices():
    workload = shipped("standard")
    assert [item.text for item in workload.items] == SENTENCES
    assert len(workload.items) >= 40
    assert len({item.voice for item in workload.items}) == 4
    assert len(workload.seeds) >= 3


def test_standard_fully_crossed_speaks_every_sentence_in_every_voice():
    items = shipped("standard", cross="full").items
    assert len(items) == 4 * len(SENTENCES)
    assert len(set(items)) == len(items)


def test_long_has_three_passages_below_the_cap_and_one_beyond():
    lengths = sorted(len(item.text) for item in shipped("long").items)
    assert all(300 <= length <= 500 for length in lengths[:-1])
    assert len(lengths[:-1]) >= 3
    assert lengths[-1] > 40 * 17  # the cap is 40 s, and the fastest voice says 17 characters a second


def test_languages_is_in_several_and_says_which():
    spoken = {item.language for item in shipped("languages").items}
    assert len(spoken) >= 5
    assert spoken <= set(LANGUAGES)


def test_quick_and_smoke_are_small_enough_for_a_first_look():
    for name, seconds in (("quick", 20), ("smoke", 8)):
        assert sum(len(item.text) for item in shipped(name).items) / 15 < seconds


def test_quick_has_texts_of_several_sentences_for_what_splits_texts():
    assert sum(item.text.count(". ") > 0 for item in shipped("quick").items) >= 2


def test_offline_hands_over_64_passages_of_about_ten_seconds():
    workload = shipped("offline")
    assert workload.scenario == "offline"
    assert len({item.text for item in workload.items}) == len(workload.items) == 64
    seconds = [len(item.text) / 15 for item in workload.items]
    assert 8 < min(seconds) < max(seconds) < 15
    assert sum(seconds) / 64 == pytest.approx(10, abs=2)
    assert shipped("quick").scenario == "single_stream"
    assert shipped("quick", scenario="offline").scenario == "offline"


def test_passages_are_neighbours_then_every_second_text():
    texts = ["One.", "Two.", "Three."]
    workload = load_workload(settings(texts=texts, passages={"count": 4, "sentences": 2}))
    assert said(workload) == [
        ("passage1", "One. Two.", "rms"),
        ("passage2", "Two. Three.", "rms"),
        ("passage3", "Three. One.", "rms"),
        ("passage4", "One. Three.", "rms"),
    ]


# -- crossing and identity


def test_round_robin_lets_the_voices_take_turns():
    workload = load_workload(settings(texts=["One.", "Two.", "Three."], voices=["rms", "slt"]))
    assert said(workload) == [("text1", "One.", "rms"), ("text2", "Two.", "slt"), ("text3", "Three.", "rms")]


def test_the_fingerprint_follows_the_text_alone():
    one, other = load_workload(settings(texts=["Good day."], voices=["rms", "slt"], cross="full")).items
    assert one.text_sha == other.text_sha
    assert len(one.text_sha) == 12
    (changed,) = load_workload(settings(texts=["Good day!"])).items
    assert changed.text_sha != one.text_sha


# -- a user's own file


def test_a_text_file_has_one_sentence_a_line(tmp_path: Path):
    file = tmp_path / "own.txt"
    file.write_text("Good morning.\n\n  How   are you?\n", encoding="utf-8")
    assert said(load_workload(settings(file=str(file)))) == [
        ("line1", "Good morning.", "rms"),
        ("line3", "How are you?", "rms"),
    ]


@pytest.mark.parametrize(
    "content", ["texts:\n- {id: a, text: Good day.}\n- Hello.", "[{id: a, text: Good day.}, Hello.]"]
)
def test_a_yaml_file_has_a_list_of_texts(tmp_path: Path, content):
    file = tmp_path / "own.yaml"
    file.write_text(content)
    assert said(load_workload(settings(file=str(file)))) == [("a", "Good day.", "rms"), ("text2", "Hello.", "rms")]


def test_a_voice_may_be_a_reference_clip(tmp_path: Path):
    clip = tmp_path / "me.flac"
    clip.write_bytes((ROOT / "harness/mini/weights/voices/rms.flac").read_bytes())
    assert load_workload(settings(voices=[str(clip)])).items[0].voice == str(clip)


MISTAKES = {
    "no such file": ({"file": "nowhere.txt"}, "workload.file=nowhere.txt"),
    "no text": ({"texts": []}, "workload.texts"),
    "empty text": ({"texts": ["Fine.", "  "]}, "entry 2: the text is empty"),
    "no word": ({"texts": ["?!"]}, "no word in it"),
    "over-long": ({"texts": ["word " * 500]}, "too long, 2499 characters"),
    "duplicate id": ({"texts": [{"id": "a", "text": "One."}, {"id": "a", "text": "Two."}]}, "id a is used more than"),
    "unusable id": ({"texts": [{"id": "a/b", "text": "One."}]}, "'a/b'"),
    "no text in entry": ({"texts": [{"id": "a"}]}, "entry 1"),
    "not a sentence": ({"texts": [True]}, "entry 1"),
    "missing clip": ({"voices": ["rms", "nowhere/me.wav"]}, "nowhere/me.wav"),
    "no voice": ({"voices": []}, "workload.voices"),
    "no seed": ({"seeds": []}, "workload.seeds"),
    "huge seed": ({"seeds": [2**64]}, "workload.seeds"),
    "odd seed": ({"seeds": ["first"]}, "workload.seeds"),
    "odd scenario": ({"scenario": "online"}, "workload.scenario=online"),
    "odd passages": ({"passages": {"count": 3}}, "workload.passages"),
    "no passage": ({"passages": {"count": 0, "sentences": 2}}, "workload.passages"),
    "odd crossing": ({"cross": "zigzag"}, "workload.cross=zigzag"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place(mistake):
    changes, hint = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        load_workload(settings(**changes))
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("own.txt", "Hello.\n"), ("own.yaml", "- Hello.\n")])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    (item,) = load_workload(settings(file=str(tmp_path / name))).items
    assert item.text == "Hello."


FILES = {
    "does not parse": ("own.yaml", b"texts:\n  - {id: a, text: 'Good", "own.yaml line 2"),
    "no texts": ("own.yaml", b"sentences: [Hello.]", "own.yaml, texts"),
    "not UTF-8": ("own.txt", b"caf\xe9", "own.txt: not UTF-8"),
    "empty": ("own.txt", b"\n\n", "own.txt: the file is empty"),
    "over-long line": ("own.txt", b"Fine.\n" + b"word " * 500, "own.txt line 2"),
    "unknown format": ("own.csv", b"Hello.", "own.csv"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, mistake):
    name, content, hint = FILES[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_workload(settings(file=str(tmp_path / name)))
    assert hint in str(error.value)
    assert "\n" not in str(error.value)
