"""What a report says of noise: how much calls vary, and what of it neighbours share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import Case, make_run

from harness.report import data, noise
from harness.results import RunFolder

TURNS = 400


def run(tmp_path: Path, shared: float, kept: float, noise: float = 0.1, lengths=(2, 4)) -> data.Run:
    """Turns whose two sides vary by `noise`, `shared` of that together; `kept` of it a side has from its call before.

    The audio's length is another in each turn, and its time follows.
    """
    rng = np.random.default_rng(0)
    folder = make_run(tmp_path, Case(rounds=1, texts=1))
    template = next(row for row in folder.measurements()[0] if row.pass_name == "speed")
    left = dict.fromkeys(("baseline", "production"), 0.0)
    rows, clock = [], 0.0
    for turn in range(TURNS):
        together, length = rng.normal(0, shared**0.5), float(rng.uniform(*lengths))
        names = list(left) if turn % 2 == 0 else list(left)[::-1]
        for position, name in enumerate(names):
            own = rng.normal(0, (1 - shared) ** 0.5)
            left[name] = kept * left[name] + (1 - kept**2) ** 0.5 * (together + own)
            clock += 1.0
            told = {"variant": name, "round": turn, "position": position, "audio_s": length, "started_s": clock}
            rows.append(replace(template, **told, generation_time_s=length * float(np.exp(noise * left[name]))))
    folder.utterances_file.unlink()
    for row in rows:
        folder.add_measurement(row)
    return data.load([RunFolder.open(folder.path)])[0]


@pytest.mark.parametrize(("shared", "kept"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.7)])
def test_what_neighbours_share_is_told_apart(tmp_path, shared, kept):
    told = noise.told([run(tmp_path, shared, kept)])
    deviation, sides, turns = map(float, re.findall(r"\d+\.?\d*", told))
    assert deviation == pytest.approx(10, abs=1)
    assert sides == pytest.approx(shared, abs=0.15)
    assert turns == pytest.approx(kept, abs=0.15)


def test_lengths_need_not_vary(tmp_path):
    (deviation,) = re.findall(r"by (\d+) %", noise.told([run(tmp_path, 0.0, 0.0, lengths=(3, 3))]))
    assert int(deviation) == pytest.approx(10, abs=1)


def test_rows_that_do_not_say_when_they_were_tell_nothing_of_neighbours(tmp_path):
    told = noise.told(data.load([make_run(tmp_path, Case(texts=3, rounds=12))]))
    assert "two sides" in told
    assert "neighbouring" not in told


def test_the_noisiest_job_does_not_speak_for_all(tmp_path):
    runs = [run(tmp_path / str(number), 0.8 * number, 0.0, size) for number, size in enumerate((0.3, 0.03))]
    sides = re.search(r"([\d.]+) the two sides", noise.told(runs))
    assert float(sides[1]) == pytest.approx(0.4, abs=0.1)


def test_a_text_that_came_once_tells_nothing(tmp_path):
    folder = make_run(tmp_path, Case(texts=40, rounds=1))
    assert noise.told(data.load([folder])) is None


def test_of_few_pairs_nothing_is_said(tmp_path):
    folder = make_run(tmp_path, Case(texts=3, rounds=4))
    assert noise.told(data.load([folder])) is None
