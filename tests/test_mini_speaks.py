"""Five held-out sentences end to end: the committed miniature is understood and keeps the voice asked for.

Bounds are wider than the model card's, which rest on every sentence, voice and several seeds.
"""

from __future__ import annotations

import pytest

from harness.mini import models
from harness.mini.training import evaluate


@pytest.fixture(scope="module")
def heard() -> list[evaluate.Heard]:
    if not evaluate.is_trained(models.WEIGHTS):
        pytest.skip("the model in harness/mini/weights is not trained yet: run `python -m harness.mini.training`")
    sentences = evaluate.read_sentences(evaluate.HELD_OUT)[::12]
    listener = evaluate.Listener(models.WEIGHTS)
    voices = (models.VOICES * 2)[: len(sentences)]
    clips = [evaluate.Clip("baseline", *what, 0) for what in zip(sentences, voices, strict=True)]
    return [listener.hear(clip) for clip in clips]


@pytest.mark.slow
def test_most_words_are_understood(heard):
    assert evaluate.summary(heard)["wer"] <= 0.2


@pytest.mark.slow
def test_the_voice_is_the_one_asked_for(heard):
    figures = evaluate.summary(heard)
    assert figures["similarity"] >= 0.7
    assert figures["nearest_voice"] >= 0.8


@pytest.mark.slow
def test_speech_ends_by_itself_and_lasts_as_long_as_speech_does(heard):
    for row in heard:
        assert row.ended
        assert 0.02 <= row.audio_s / len(row.clip.text) <= 0.15  # seconds a character
