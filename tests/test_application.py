"""`optimize`: upstream's object, faster, and given back as it was."""

from __future__ import annotations

import copy
import inspect
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chatterbox.mtl_tts import ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS
from conftest import ROOT
from factories import Case, make_run

import optimizations
from chatterbox_harness import UserError, optimize
from harness import combos
from harness.combos import read_combo
from harness.mini import models
from harness.report import data, usage
from optimizations import Evidence, Optimization

TEXT = "Yes, it does."
CLIP = ROOT / "harness/mini/weights/voices/slt.flac"
SMALL = {"inference_mode": True, "kv_cache": {"bucket": 64}}
"""A combo that is applied in no time."""


@pytest.fixture(scope="module")
def _tts() -> ChatterboxTTS:
    return models.load("cpu")[0]


@pytest.fixture
def tts(_tts):
    """Upstream's object, unchanged and with the voice that it came with."""
    conditionals = copy.deepcopy(_tts.conds)
    yield _tts
    optimized = [item for item in made if item._in_place]
    for item in optimized:
        item.restore()
    made.clear()
    _tts.conds = conditionals


made: list = []


def optimized(tts, combo="baseline"):
    made.append(optimize(tts, combo))
    return made[-1]


class LanguageTokenizer:
    """The miniature's characters under the multilingual tokenizer's method; the language is a letter in front."""

    def __init__(self):
        self.characters = models.build_tokenizer()

    def text_to_tokens(self, text: str, language_id: str | None = None):
        return self.characters.text_to_tokens(f"{(language_id or 'x')[0]} {text}")


def multilingual(tts: ChatterboxTTS) -> ChatterboxMultilingualTTS:
    return ChatterboxMultilingualTTS(tts.t3, tts.s3gen, tts.ve, LanguageTokenizer(), "cpu", tts.conds)


def conversation(tts, *calls: dict) -> list[torch.Tensor]:
    """What the calls give, one after the other, from one seed at the start."""
    torch.manual_seed(7)
    return [tts.generate(**call) for call in calls]


def assert_same(waves, others):
    assert len(waves) == len(others)
    for wave, other in zip(waves, others, strict=True):
        assert wave.dtype == other.dtype
        assert torch.equal(wave, other)


def everything(tts) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("t3", "s3gen", "ve")
        for name, tensor in getattr(tts, part).state_dict().items()
    }


# -- as upstream speaks ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unmodified_it_is_upstream_bit_for_bit_call_after_call(tts):
    calls = [
        {"text": TEXT},
        {"text": "No."},  # goes on with the random numbers where the first stopped
        {"text": "No.", "exaggeration": 0.7, "cfg_weight": 0.3, "temperature": 0.6, "min_p": 0.1, "top_p": 0.9},
        {"text": "No.", "repetition_penalty": 1.5, "audio_prompt_path": str(CLIP)},
        {"text": "No."},  # in the clip's voice from now on
    ]
    voice = copy.deepcopy(tts.conds)
    expected = conversation(tts, *calls)
    tts.conds = voice
    assert_same(conversation(optimized(tts), *calls), expected)


@pytest.mark.slow
def test_so_it_is_with_many_languages(tts):
    upstream = multilingual(tts)
    calls = [
        {"text": "Ja。", "language_id": "DE"},  # upstream's multilingual punctuation ends here, the English does not
        {"text": "Oui", "language_id": "fr", "temperature": 0.7},
        {"text": "Yes", "language_id": None},
    ]
    voice = copy.deepcopy(tts.conds)
    expected = conversation(upstream, *calls)
    upstream.conds = voice
    spoken = optimized(upstream)
    assert_same(conversation(spoken, *calls), expected)
    with pytest.raises(ValueError, match="'xx'"):
        spoken.generate("Hello.", "xx")


@pytest.mark.parametrize("wrap", [lambda tts: tts, multilingual], ids=["english", "multilingual"])
def test_its_signature_is_upstreams(tts, wrap):
    upstream = wrap(tts)
    spoken = optimized(upstream)
    assert inspect.signature(spoken.generate) == inspect.signature(upstream.generate)
    with pytest.raises(TypeError):
        spoken.generate(TEXT, volume=11)


def test_other_attributes_are_upstreams_both_ways(tts):
    spoken = optimized(tts)
    assert (spoken.sr, spoken.device, spoken.t3) == (24_000, "cpu", tts.t3)
    spoken.conds = other = copy.deepcopy(tts.conds)
    assert tts.conds is other
    spoken.prepare_conditionals(str(CLIP))
    assert tts.conds is not other
    with pytest.raises(AttributeError):
        _ = spoken.volume


# -- faster, and back --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_production_speaks_reports_and_leaves_no_trace(tts):
    before, weights, attributes = conversation(tts, {"text": TEXT}), everything(tts), dict(vars(tts))
    spoken = optimized(tts, "production")
    (wave,) = conversation(spoken, {"text": TEXT, "exaggeration": 0.8})
    assert wave.dtype == before[0].dtype
    assert wave.ndim == 2
    assert wave.abs().max() > 0.01
    report = spoken.report()
    assert report["combo"] == "production"
    assert {"kv_cache", "compile", "fused_vocoder", "gpu_watermark"} <= set(report["active"])
    assert "CUDA" in report["unavailable"]["cuda_graphs"]
    assert report["failed"] == report["inactive"] == {}
    assert report["evidence"]["kv_cache"]["cat_calls_per_token"] == 0
    assert spoken.restore() is tts
    assert vars(tts) == attributes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in everything(tts).items())
    assert_same(conversation(tts, {"text": TEXT}), before)


@pytest.mark.slow
def test_random_numbers_outside_stay(tts):
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    spoken = optimized(tts, {**SMALL, "warmup": {"levels": 1}})
    assert torch.equal(torch.random.get_rng_state(), state)
    spoken.report()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_settings_are_a_calls_own(tts):
    spoken = optimized(tts, SMALL)
    (plain,) = conversation(spoken, {"text": TEXT})
    conversation(spoken, {"text": TEXT, "temperature": 0.1, "exaggeration": 1.0})
    assert_same(conversation(spoken, {"text": TEXT}), [plain])


def test_several_threads_take_turns(tts, monkeypatch):
    spoken = optimized(tts)
    inside, most, texts = [], [], []

    def synthesize(text, voice, seed):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(text)
        texts.append(text)
        return type("Utterance", (), {"wave": torch.zeros(10).numpy()})

    monkeypatch.setattr(spoken._pipeline, "synthesize", synthesize)
    threads = [threading.Thread(target=spoken.generate, args=(f"Text {i}.",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(texts) == 8


# -- what is refused, and what is left out -----------------------------------------------------------------------


def test_nothing_is_optimized_twice(tts):
    spoken = optimized(tts, SMALL)
    for again in (spoken, tts):
        with pytest.raises(UserError, match="optimized already: call restore"):
            optimize(again)
    spoken.restore()
    assert spoken.restore() is tts
    with pytest.raises(UserError, match="was restored"):
        spoken.generate(TEXT)
    assert optimized(tts, SMALL).generate(TEXT).ndim == 2


def test_only_a_model_with_a_voice_is_taken(tts):
    with pytest.raises(UserError, match="and this is a str"):
        optimize("tts")
    tts.conds = None
    with pytest.raises(UserError, match="has no voice yet: call its prepare_conditionals"):
        optimize(tts)


class Odd(Optimization):
    name = "odd"

    @dataclass
    class Config:
        how: str = "raises"

    def environment(self):
        return {"ODD_VARIABLE": "1"} if self.config.how == "wants a variable" else {}

    def apply(self, pipeline):
        pipeline.wrap_stage("mel_to_wave", lambda stage: lambda mels: [0 * wave for wave in stage(mels)])
        if self.config.how == "raises":
            raise RuntimeError("out of sorts")
        if self.config.how == "blames":
            raise UserError("odd.how: choose another")

    def evidence(self, pipeline):
        return Evidence(True)


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setitem(optimizations.CATALOGUE, "odd", Odd)


@pytest.mark.slow
def test_one_that_fails_is_left_out_and_told(tts, odd):
    before = conversation(tts, {"text": TEXT})
    with pytest.warns(UserWarning, match="odd failed and is left out: RuntimeError: out of sorts"):
        spoken = optimized(tts, {**SMALL, "odd": {}})
    (wave,) = conversation(spoken, {"text": TEXT})
    assert wave.shape == before[0].shape
    assert wave.abs().max() > 0.01
    report = spoken.report()
    assert report["active"] == ["inference_mode", "kv_cache"]
    assert "out of sorts" in report["failed"]["odd"]


def test_a_variable_that_came_too_late_is_named(tts, odd, monkeypatch):
    spoken = optimized(tts, {"odd": {"how": "wants a variable"}})
    assert "ODD_VARIABLE=1: set it before Python starts" in spoken.report()["unavailable"]["odd"]
    spoken.restore()
    monkeypatch.setenv("ODD_VARIABLE", "1")
    assert optimized(tts, {"odd": {"how": "wants a variable"}}).report()["active"] == ["odd"]


def test_a_mistake_in_a_combo_leaves_the_object_as_it_was(tts, odd):
    before, attributes = conversation(tts, {"text": TEXT}), dict(vars(tts))
    with pytest.raises(UserError, match=r"odd\.how: choose another"):
        optimize(tts, {**SMALL, "odd": {"how": "blames"}})
    with pytest.raises(UserError, match="did you mean kv_cache"):
        optimize(tts, {"kv_cash": {}})
    assert vars(tts) == attributes
    assert_same(conversation(tts, {"text": TEXT}), before)


# -- the lines that a report ends with -----------------------------------------------------------------------------

FILE = "optimizations:\n  inference_mode: {enabled: true}\n  kv_cache: {enabled: true, bucket: 64}\n"


@pytest.mark.parametrize(
    ("pipeline", "bucket", "combo"),
    [("mini", 64, "small"), ("mini_multilingual", 128, "custom")],
    ids=["by name", "as a mapping"],
)
def test_the_lines_that_a_report_ends_with_run(tts, tmp_path, monkeypatch, pipeline, bucket, combo):
    monkeypatch.setattr(combos, "FILES", tmp_path)
    (tmp_path / "small.yaml").write_text(FILE)
    parameters = {"kv_cache": {"bucket": bucket, "prefix_reuse": True}}
    (run,) = data.load([make_run(tmp_path, Case(combo="small", pipeline=pipeline, parameters=parameters))])
    monkeypatch.setattr(ChatterboxTTS, "from_pretrained", lambda device: tts)
    monkeypatch.setattr(ChatterboxMultilingualTTS, "from_pretrained", lambda device: multilingual(tts))
    scope: dict = {}
    exec(usage.lines(run), scope)
    made.append(scope["tts"])
    spoken = scope["tts"]
    assert (spoken._combo, list(spoken._fitted.plugins)) == (combo, ["inference_mode", "kv_cache"])
    assert spoken._fitted.plugins["kv_cache"].config.bucket == bucket
    assert scope["wave"].ndim == 2


# -- combos ------------------------------------------------------------------------------------------------------


def test_a_combo_is_a_name_a_file_or_a_mapping(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# as a report prints it\noptimizations:\n  kv_cache: {bucket: 64, enabled: true}\n  vocos: {}\n")
    kv_cache = {"kv_cache": {"bucket": 64}}
    for combo in (file, str(file), {"combo": "mine", "optimizations": {"kv_cache": {"enabled": True, "bucket": 64}}}):
        assert read_combo(combo, optimizations) == ("mine", kv_cache)
    for short in (kv_cache, {"kv_cache": {"bucket": 64}, "vocos": False}, {"vocos": {"enabled": False}, **kv_cache}):
        assert read_combo(short, optimizations) == ("custom", kv_cache)
    assert read_combo("baseline", optimizations) == ("baseline", {})
    assert read_combo({}, optimizations) == ("custom", {})
    _, toggles = read_combo({"warmup": None, "kv_cache": True}, optimizations)
    assert list(toggles) == ["kv_cache", "warmup"]  # in the order of application


def test_every_committed_combo_is_read_as_hydra_reads_it():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from harness.config import register_catalogue

    register_catalogue([])
    for file in (ROOT / "configs/combo").glob("*.yaml"):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            composed = OmegaConf.to_container(compose("config", [f"combo={file.stem}"]).optimizations)
        name, toggles = read_combo(file.stem, optimizations)
        assert name == file.stem
        assert list(toggles) == [name for name in composed if composed[name]["enabled"]]
        for optimization, parameters in toggles.items():
            assert parameters.items() <= composed[optimization].items()


@pytest.mark.parametrize(
    ("combo", "says"),
    [
        ("productoin", "no combo 'productoin' (did you mean production?); known: baseline, campaign"),
        ("", "there is no combo ''"),
        ("../combo/production", "there is no combo"),
        ("absent.yaml", "there is no file absent.yaml"),
        (Path("list.yaml"), "list.yaml: a combo's file lists what it switches on"),
        (Path("other.yaml"), "a combo's file lists what it switches on"),
        (Path("extra.yaml"), "extra.yaml: has device; a combo has"),
        (Path("broken.yaml"), "broken.yaml: cannot be read as a combo"),
        ({"kv_cash": {}}, "unknown optimization 'kv_cash' (did you mean kv_cache?)"),
        ({"kv_cache": {"buckets": 1}}, "kv_cache has no parameter 'buckets' (did you mean bucket?)"),
        ({"kv_cache": 3}, "kv_cache: expected parameters, true or false, and not 3"),
        ({"optimizations": ["kv_cache"]}, "expected names of optimizations with their parameters"),
        ({5: {}}, "unknown optimization '5'"),
    ],
)
def test_what_is_no_combo_is_named(combo, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- kv_cache\n")
    Path("other.yaml").write_text("kv_cache: {enabled: true}\n")
    Path("extra.yaml").write_text("optimizations: {}\ndevice: cuda\n")
    Path("broken.yaml").write_text("optimizations: {\n")
    with pytest.raises(UserError) as error:
        read_combo(combo, optimizations)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stream_is_what_generate_says_in_pieces(tts):
    spoken = optimized(tts, {"flow_steps": {"steps": 1}, "streaming": {"first": 4}})
    torch.manual_seed(1)
    whole = spoken.generate(TEXT)
    torch.manual_seed(1)
    pieces = list(spoken.stream(TEXT, temperature=0.8))
    assert len(pieces) > 1
    assert all(piece.shape[0] == 1 for piece in pieces)
    assert torch.cat(pieces, dim=1).shape == whole.shape


def test_without_the_optimization_a_stream_is_one_piece(tts):
    spoken = optimized(tts, {"flow_steps": {"steps": 1}})
    torch.manual_seed(1)
    whole = spoken.generate(TEXT)
    torch.manual_seed(1)
    (piece,) = spoken.stream(TEXT)
    assert torch.equal(piece, whole)


def test_while_a_stream_is_open_nothing_else_is_said(tts):
    spoken = optimized(tts, {"flow_steps": {"steps": 1}, "streaming": {"first": 4}})
    pieces = spoken.stream(TEXT)
    next(pieces)
    with pytest.raises(UserError, match="a stream is not over yet"):
        spoken.generate(TEXT)
    pieces.close()
    assert spoken.generate(TEXT).shape[0] == 1
