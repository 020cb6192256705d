"""Requests that join the running batch say what they say alone, whoever is there; who is next; nobody is forgotten."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from applied import apply_one, apply_one_uncaptured
from conftest import ROOT
from listening import Listener

import optimizations
from harness import checkpoints
from harness.load import Closed, News, drive, level, most_kept
from harness.locations import HELD_OUT
from harness.pipeline import Chunk, Desk, Pipeline, Request, SynthesisError, Utterance
from harness.quality.watermark import create_detector

TEXTS = ("Yes, it does.", "Where did you leave the keys of the car?", "No.", "We will meet at the old bridge.")
LONG = "The boats were already back when we reached the harbour. Somebody had left a lamp burning on the wall."
SMALL = {"slots": 3, "together": 2, "round": 4, "first": 3, "longest": 12}


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline) -> Iterator[Pipeline]:
    apply_one(loaded, "flow_steps", steps=1)  # nobody listens
    yield loaded
    loaded.reset()
    assert loaded.server is None


def requests(pipeline: Pipeline, pins: Sequence[int | None]) -> list[Request]:
    voices = list(pipeline.voices)
    return [Request(TEXTS[i % 4], voices[i % len(voices)], 10 + i, pin) for i, pin in enumerate(pins)]


def serve(desk: Desk, wanted: Sequence[Request], every: int = 3) -> dict[int, tuple[list[Chunk], Utterance]]:
    """Each request comes `every` turns of the desk's after the one before."""
    chunks: dict[int, list[Chunk]] = {number: [] for number in range(len(wanted))}
    whole: dict[int, Utterance] = {}
    came = turns = 0
    while came < len(wanted) or len(whole) < len(wanted):
        if came < len(wanted) and turns >= every * came:
            desk.take(came, wanted[came])
            came += 1
        for number, news in desk.work() or []:
            if isinstance(news, Chunk):
                assert number not in whole
                chunks[number].append(news)
            else:
                assert isinstance(news, Utterance), news
                whole[number] = news
        turns += 1
        assert turns < 2000
    assert desk.work() is None
    return {number: (chunks[number], whole[number]) for number in whole}


@pytest.mark.parametrize("cache", [pytest.param([], marks=pytest.mark.slow), ["kv_cache"]], ids=["growing", "static"])
def test_greedy_tokens_are_those_of_who_speaks_alone(mini: Pipeline, cache: list[str]) -> None:
    """More callers than places, of different voices and lengths, some that stop by themselves."""
    mini.swap(mini, "sampling", replace(mini.sampling, temperature=0.0))
    for name in cache:
        apply_one(mini, name)
    wanted = requests(mini, (9, 16, None, 5, 7))
    alone = [mini.synthesize(one.text, one.voice, one.seed, one.n_tokens) for one in wanted]
    plugin = apply_one(mini, "continuous_batching", **SMALL)
    served = serve(mini.desk(), wanted)
    for number, utterance in enumerate(alone):
        chunks, whole = served[number]
        assert torch.equal(whole.tokens[0], utterance.tokens[0])
        assert len(whole.wave) == len(utterance.wave)
        np.testing.assert_array_equal(whole.wave, np.concatenate([chunk.wave for chunk in chunks]))
        assert np.isfinite(whole.wave).all()
    shown = plugin.evidence(mini)
    assert shown.active
    assert max(map(int, shown.facts["passes_by_utterances"])) == 2


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_who_is_there(mini: Pipeline) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    wanted = requests(mini, (9, 14, 5))
    together = serve(mini.desk(), wanted)
    for number, one in enumerate(wanted):
        (_, whole) = serve(mini.desk(), [one])[0]
        assert torch.equal(whole.tokens[0], together[number][1].tokens[0])
    other = serve(mini.desk(), [replace(wanted[1], seed=99)])[0][1]
    assert not torch.equal(other.tokens[0], together[1][1].tokens[0])


@pytest.mark.slow
def test_a_wave_in_company_is_the_wave_alone(mini: Pipeline) -> None:
    """Each with its own noise and its own phases, whatever the passes of the flow were; in equal pieces."""
    apply_one(mini, "continuous_batching", **SMALL | {"first": 6, "longest": 6, "context": 250})
    wanted = requests(mini, (18, 18, 18))
    together = serve(mini.desk(), wanted, every=0)
    for number, one in enumerate(wanted):
        (_, whole) = serve(mini.desk(), [one])[0]
        difference = whole.wave - together[number][1].wave
        assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(whole.wave)


def test_the_first_words_come_before_others_are_through(mini: Pipeline) -> None:
    """Somebody who comes while long utterances are spoken has sound before those have ended."""
    apply_one(mini, "continuous_batching", **SMALL)
    desk = mini.desk()
    for caller, one in enumerate(requests(mini, (60, 60))):
        desk.take(caller, one)
    heard, ended = [], set()
    while len(heard) < 2:
        heard += [caller for caller, _ in desk.work() or [] if caller not in heard]
    desk.take(2, requests(mini, (60, 60, 9))[2])
    while 2 not in heard:
        for caller, news in desk.work() or []:
            heard.append(caller)
            ended |= {caller} if isinstance(news, Utterance) else set()
    assert not ended


def test_a_first_piece_waits_for_no_token_that_it_does_not_need(mini: Pipeline) -> None:
    """Rounds of four tokens, and a piece of three with three behind it."""
    apply_one(mini, "continuous_batching", **SMALL)
    desk = mini.desk()
    desk.take(0, requests(mini, (60,))[0])
    while not desk.work():
        pass
    assert mini.server._slots.n_steps == 6  # type: ignore[union-attr]


def test_a_voice_is_read_once_for_all_who_come_with_it(mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    desk, read, prepare = mini.desk(), [], mini.model.t3.prepare_conditioning
    desk.work()
    monkeypatch.setattr(mini.model.t3, "prepare_conditioning", lambda voice: read.append(voice) or prepare(voice))
    one, other = requests(mini, (5, 5))
    for caller, request in enumerate((one, replace(other, voice=one.voice))):
        desk.take(caller, request)
    desk.work()
    assert len(read) == 1


def test_later_pieces_are_made_together_when_all_have_sound(mini: Pipeline) -> None:
    """They take more steps than first ones, and a pass of as many would keep somebody without sound waiting."""
    apply_one(mini, "flow_steps", steps=2)
    plugin = apply_one(mini, "continuous_batching", **SMALL | {"first_steps": 1})
    serve(mini.desk(), requests(mini, (24, 24)), every=0)
    assert set(plugin.evidence(mini).facts["passes_by_utterances"]) == {"2"}


@pytest.mark.slow
def test_the_mark_is_found_in_what_was_said_in_company(mini: Pipeline) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    detector = create_detector()
    assert detector is not None
    for _, whole in serve(mini.desk(), requests(mini, (30, 30))).values():
        assert detector.read(whole.wave, whole.sample_rate) > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_callers_are_understood_as_the_whole_of_their_tokens_is(mini: Pipeline) -> None:
    """Pieces made in company, of windows that see little, and one pass over the same tokens; figures are printed."""
    mini.reset()
    for name, parameters in combo("serving").items():
        plugin = optimizations.create(name, parameters)
        if plugin.unavailable(mini) is None:
            plugin.apply(mini)
    listener, voices, heard = Listener(), list(mini.voices), []
    sentences = HELD_OUT.read_text().splitlines()
    texts = [" ".join(sentences[3 * index : 3 * index + 2]) for index in range(12)]
    wanted = [Request(text, voices[i % len(voices)], i) for i, text in enumerate(texts)]
    for number, (_, said) in serve(mini.desk(), wanted, every=0).items():
        text, voice = wanted[number].text, wanted[number].voice
        with mini.as_in_a_synthesis(), torch.inference_mode():
            torch.manual_seed(number)
            mels = mini.stages["tokens_to_mel"]([said.tokens[0]], [mini.stages["condition"](voice)])
            (whole,) = mini.stages["watermark"](mini.stages["mel_to_wave"](mels))
        heard.append([listener.judge(text, voice, wave, said.sample_rate) for wave in (whole, said.wave)])
    (wer, sim, _), (wer_pieces, sim_pieces, _) = np.mean(heard, axis=0)
    print(f"\nWER {wer:.4f} whole, {wer_pieces:.4f} in pieces; similarity {sim:.4f}, {sim_pieces:.4f}")
    assert min(pieces.mark for _, pieces in heard) > 0.5
    assert wer_pieces <= wer + 0.02
    assert sim_pieces >= sim - 0.02


def test_segments_of_a_text_follow_one_another(mini: Pipeline) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    mini.wrap_stage("split_text", lambda _whole: lambda text: ["Yes.", "No."])
    for _, whole in serve(mini.desk(), requests(mini, (14, 14, 14, 14))).values():
        assert [len(tokens) for tokens in whole.tokens] == [8, 6]
        assert len(whole.wave) == 960 * 14


def test_a_text_that_has_no_room_is_an_error_of_its_own(mini: Pipeline) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    desk = mini.desk()
    short = requests(mini, (5,))[0]
    desk.take(0, replace(short, text="a " * 400))
    desk.take(1, short)
    news = []
    while (told := desk.work()) is not None:
        news += told
    assert isinstance(dict(news)[0], SynthesisError)
    assert isinstance(news[-1][1], Utterance)


def test_a_desk_that_was_left_leaves_its_places(mini: Pipeline) -> None:
    apply_one(mini, "continuous_batching", **SMALL)
    desk = mini.desk()
    for caller, one in enumerate(requests(mini, (60, 60, 60, 60))):
        desk.take(caller, one)
    for _ in range(5):
        desk.work()
    assert len(serve(mini.desk(), requests(mini, (5, 5, 5, 5)))) == 4


def test_unmodified_they_speak_one_after_the_other(mini: Pipeline) -> None:
    wanted = requests(mini, (5, 7))
    for number, (chunks, whole) in serve(mini.desk(), wanted).items():
        alone = mini.synthesize(wanted[number].text, wanted[number].voice, wanted[number].seed, wanted[number].n_tokens)
        assert len(chunks) == 1
        np.testing.assert_array_equal(whole.wave, alone.wave)


def test_whole_utterances_are_as_without_it(mini: Pipeline) -> None:
    before = mini.synthesize(TEXTS[0], "rms", 1, 5)
    apply_one(mini, "continuous_batching", **SMALL)
    serve(mini.desk(), requests(mini, (5,)))
    torch.testing.assert_close(mini.synthesize(TEXTS[0], "rms", 1, 5).tokens, before.tokens)


@pytest.mark.slow
def test_what_was_prepared_is_all_that_is_needed(mini: Pipeline) -> None:
    """A shape that comes while somebody waits would be captured then."""
    graphs = apply_one_uncaptured(mini, "cuda_graphs", tokens=60)
    server = apply_one(mini, "continuous_batching", **SMALL | {"first": 16, "longest": 20, "context": 10}).server
    server.prepare(requests(mini, (5,))[0])
    before = [Counter(one.captured) for one in (graphs.graphs, server.graphs)]
    serve(mini.desk(), requests(mini, (50, 25, 18)), every=1)
    for one, counted in zip((graphs.graphs, server.graphs), before, strict=True):
        assert sum(counted.values()) > 3
        assert {stage: n for stage, n in one.captured.items() if stage != "slots"} == {
            stage: n for stage, n in counted.items() if stage != "slots"
        }, "steps of T3 read as far as they have to on a CPU"


def test_evidence_asks_for_company(mini: Pipeline) -> None:
    plugin = apply_one(mini, "continuous_batching", **SMALL)
    mini.rehearse(TEXTS[0], "rms", 1, 5)
    assert "nobody opened" in str(plugin.evidence(mini).reason)
    serve(mini.desk(), requests(mini, (5,)))
    assert "while others" in str(plugin.evidence(mini).reason)


# -- full size, on a GPU ---------------------------------------------------------------------------------------------


class Near:
    """A counter in front of a desk in this very process."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def take(self, caller: int, request: Request) -> None:
        self.desk.take(caller, request)

    def news(self, patience_s: float) -> list[News] | None:
        told = self.desk.work()
        if told is None:
            return None
        return [
            News(caller, one.audio_s) if isinstance(one, Chunk) else News(caller, 0.0, True, isinstance(one, Exception))
            for caller, one in told
        ]


@pytest.mark.gpu
def test_gpu_streams_of_one_gpu_at_full_size() -> None:
    """Utterances of 250 tokens in closed loop; figures are printed, of which the issue wants 32 users within 300 ms."""
    large = checkpoints.load("random", "cuda")
    for name, parameters in combo("serving").items():
        plugin = optimizations.create(name, parameters)
        if plugin.unavailable(large) is None:
            plugin.apply(large)
    levels = []
    for users in (1, 8, 16, 32, 48):
        wanted = [Request(LONG, next(iter(large.voices)), 100 * users + i, 230 + i % 41) for i in range(3 * users)]
        start = time.perf_counter()
        served = drive(Near(large.desk()), Closed(users, len(wanted)), wanted)
        took_s = time.perf_counter() - start
        heard = [one.heard() for one in served]
        levels.append(level(users, heard))
        audio_s = sum(one.audio_s for one in heard if one)
        print(f"\n{levels[-1]}\n{audio_s / took_s:.1f} s of audio a second; {large.server.tally}")
    assert (most_kept(levels, 0.3) or 0) >= 32


def combo(name: str) -> dict[str, dict]:
    """The switched-on optimizations of a combo, in the catalogue's order, with their parameters."""
    found = yaml.safe_load((ROOT / f"configs/combo/{name}.yaml").read_text())["optimizations"]
    on = {plugin: found[plugin] for plugin in optimizations.names() if found.get(plugin, {}).get("enabled")}
    return {plugin: {k: v for k, v in given.items() if k != "enabled"} for plugin, given in on.items()}
