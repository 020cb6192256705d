"""The miniature's lessons: what its voices say, and flite's speech with its phones."""

from __future__ import annotations

import random

import numpy as np
import pytest

from harness.errors import UserError
from harness.mini.models import CHARACTERS, VOICES
from harness.mini.training import speech, text


def test_grammar_has_an_everyday_vocabulary():
    assert len(text.vocabulary()) >= 1500


def test_texts_are_varied_short_enough_and_spelled_in_the_tokenizers_characters():
    rng = random.Random(0)
    texts = [text.utterance(rng) for _ in range(2000)]
    assert len(set(texts)) > 1980
    assert max(map(len, texts)) <= 360
    assert set("".join(texts)) <= set(CHARACTERS) | {" "}
    assert any(words.endswith("?") for words in texts)


def test_held_out_sentences_are_never_given(monkeypatch):
    rng = random.Random(1)
    seen = [text.sentence(rng) for _ in range(50)]
    forbidden = frozenset(map(text.plain, seen))
    monkeypatch.setattr(text, "held_out", lambda: forbidden)
    again = random.Random(1)  # the same choices would give the same sentences
    assert not forbidden & {text.plain(text.sentence(again)) for _ in range(50)}


def test_held_out_list_is_found():
    assert len(text.held_out()) == 60


@pytest.fixture(scope="module")
def flite():
    try:
        speech.speak("Hello.", "slt")
    except UserError as error:
        pytest.skip(str(error))


def test_phones_follow_the_speech(flite):
    samples, phones = speech.speak("The boy ate an apple.", "rms")
    names = [speech.PHONES[index] for index in phones]
    heard = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    assert len(phones) == -(-len(samples) // speech.PHONE_HOP)
    assert heard[0] == heard[-1] == "pau"
    assert heard[1:5] == ["dh", "ax", "b", "oy"]
    loud = np.abs(samples[: len(phones) * 320 - 320].reshape(-1, 320)).max(1)
    silent = phones[: len(loud)] == speech.PHONES.index("pau")
    assert loud[~silent].mean() > 10 * loud[silent].mean()


def test_a_corpus_is_the_same_for_the_same_seed_and_splits_without_overlap(flite, tmp_path):
    corpus = speech.make_corpus(0.01, seed=3, workers=2)
    again = speech.make_corpus(0.01, seed=3, workers=1)
    assert corpus.texts == again.texts
    assert np.array_equal(corpus.audio, again.audio)
    assert set(corpus.voices) == set(range(len(VOICES)))

    corpus.save(tmp_path)
    kept, held = speech.Corpus.load(tmp_path).split(0.2)
    assert len(kept) + len(held) == len(corpus)
    row = len(kept) + 1
    samples = corpus.audio[corpus.starts[row] :][: corpus.lengths[row]]
    assert np.array_equal(held.audio[held.starts[1] :][: held.lengths[1]], samples)
    phones = corpus.phones[corpus.phone_starts[row] :][: -(-corpus.lengths[row] // 320)]
    assert np.array_equal(held.phones[held.phone_starts[1] :][: len(phones)], phones)


def test_a_missing_corpus_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="data stage"):
        speech.Corpus.load(tmp_path)
