"""The judges on real speech, and the scores they give. The clips in tests/data/speech are flite's."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from harness.errors import UserError
from harness.quality import asr, judges, scoring, signals, speaker, watermark
from harness.quality.normalizer import normalize
from harness.quality.words import surplus, word_errors
from harness.results import Measurement, RunFolder

SPEECH = Path(__file__).parent / "data/speech"
DINNER = "How many people are coming to dinner tonight?"
RATE = 16_000


@cache
def clip(name: str) -> tuple[np.ndarray, int]:
    return scoring.read_wave(SPEECH / f"{name}.ogg")


@pytest.fixture(scope="module")
def pocketsphinx():
    return asr.create_transcriber("pocketsphinx")


@pytest.fixture(scope="module")
def resemblyzer():
    return speaker.create_encoder("resemblyzer")


@pytest.fixture(scope="module")
def perth_detector():
    return watermark.create_detector()


@cache
def marked(name: str) -> tuple[np.ndarray, int]:
    """A clip as upstream would hand it out."""
    import perth

    wave, rate = clip(name)
    return perth.PerthImplicitWatermarker().apply_watermark(wave, sample_rate=rate).astype(np.float32), rate


# -- words


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Hello, World!", "hello world"),
        ("DON’T   stop…", "do not stop"),
        ("‘Quoted’ and the dogs' own 'em", "quoted and the dogs own em"),
        ("second-hand — and on", "2nd hand and on"),
        ("tab\tand\nline", "tab and line"),
        ("ﬁne café", "fine cafe"),
        ("(so he said) [laughs]", "so he said"),
        ("?! ' —", ""),
        ("Um.", "um"),
        ("Is there a a cat? Am I a fool?", "is there a a cat am i a fool"),
    ],
)
def test_normalizing_keeps_the_words(text, normalized):
    assert normalize(text) == normalized
    assert normalize(normalized) == normalized


SOUND_ALIKE = """
    fifty turns                           | 50 turns
    the twenty first of June              | the 21st of June
    doctor smith                          | Dr. Smith
    mister and missus jones               | Mr. and Mrs. Jones
    professor green met captain hook      | Prof. Green met Capt. Hook
    three hundred forty five thousand dollars     | $345,000
    three hundred and forty-five thousand dollars | 345,000 dollars
    twenty million dollars                | $20 million
    three million dollars                 | $3M
    two and a half million                | 2.5 million
    three dollars and fifty cents         | $3.50
    ten euros and five pounds             | €10 and £5
    ninety nine cents                     | 99¢
    a dollar                              | $1
    fifty percent                         | 50%
    twelve point five per cent            | 12.5 %
    nineteen ninety nine                  | 1999
    nineteen oh five                      | 1905
    two thousand and one                  | 2001
    the nineteen eighties                 | the 1980s
    a thousand two hundred thirty four    | 1,234
    a hundred                             | 100
    three thirty p m                      | 3:30 p.m.
    seven oh five                         | 7:05
    eight thirty                          | 08:30
    seven a.m.                            | 7:00 AM
    ten o’clock                           | 10:00
    January fifth, two thousand twenty    | Jan. 5, 2020
    may twenty-first                      | May 21
    minus five degrees celsius            | -5 °C
    five kilograms                        | 5 kg
    one kilogram and thirty seconds       | 1 kg and 30 sec
    ten kilometres per hour               | 10 km/h
    two and a half                        | 2½
    one half                              | 1/2
    two and three quarters                | 2 3/4
    two thirds                            | 2/3
    twenty four seven                     | 24/7
    double oh seven                       | 007
    five five five zero one nine nine     | 555-0199
    room one oh one                       | Room 101
    number five                           | No. 5
    number one                            | #1
    rock and roll                         | Rock & Roll
    u s a                                 | the U.S.A.
    i b m                                 | IBM
    okay                                  | O.K.
    she can not and will not              | she can't and won't
    cannot                                | can't
    they are                              | they’re
    colour, travelled, organised, theatre | color, traveled, organized, theater
    well known                            | well-known
    example dot com                       | example.com
    two plus two equals four              | 2 + 2 = 4
    nineteen fourteen to nineteen eighteen        | 1914–1918
    point five                            | 0.5
    three point one four                  | 3.14
    first second third                    | 1st 2nd 3rd
    one two three                         | 1, 2, 3
    one hundred and one dalmatians        | 101 Dalmatians
    versus                                | vs.
    three pounds fifty                    | £3.50
    three pounds and fifty pence          | £3.50
    it cost nineteen dollars ninety nine. | It cost $19.99.
    five dollars twenty people            | $5, 20 people
    chapter four of world war two         | Chapter IV of World War II
    five foot ten                         | 5'10"
    five feet ten inches                  | 5'10"
    nineteen fourteen to nineteen eighteen        | 1914-1918
    pages three to five                   | pages 3-5
    an email                              | an e-mail
    ten downing street                    | 10 Downing St.
    saint mary is in baker street and sergeant pepper too | St. Mary is in Baker St. and Sgt. Pepper too
"""


@pytest.mark.parametrize("pair", SOUND_ALIKE.strip().splitlines())
def test_what_sounds_alike_is_no_error_however_it_is_written(pair):
    said, written = (side.strip() for side in pair.split("|"))
    written = written.removeprefix("the ") if "the" not in said else written
    for text, heard in ((said, written), (written, said)):
        assert word_errors(text, heard)["wer"] == 0


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("fifty turns", "15 turns"),
        ("$345,000", "$345"),
        ("Dr. Smith", "Mr. Smith"),
        ("21st", "22nd"),
        ("3:30", "3:13"),
        ("£3.50", "£3.15"),
        ("part i", "part a"),
        ("5'10\"", "5'11\""),
        ("1914-1918", "1914-1919"),
    ],
)
def test_what_sounds_different_is_an_error(text, heard):
    assert word_errors(text, heard)["wer"] > 0


@pytest.mark.parametrize(
    ("language", "text", "normalized"),
    [
        ("fr", "L’homme est (bien) arrivé !", "l homme est bien arrivé"),
        ("de", "Größer, Straße.", "größer straße"),
        ("ru", "Привет, мир!", "привет мир"),
        ("hi", "हिन्दी में बोलो।", "हिन्दी में बोलो"),
        ("zh", "今天，很好！", "今 天 很 好"),
        ("zh-CN", "好 的", "好 的"),
        ("ja", "がんばって。", "が ん ば っ て"),
        ("th", "สวัสดี", "ส วั ส ดี"),
    ],
)
def test_other_languages_keep_their_letters_and_without_spaces_a_character_is_a_word(language, text, normalized):
    assert normalize(text, language) == normalized


def test_the_character_error_rate_is_finer_and_the_same_where_words_are_characters():
    score = word_errors("the front door", "the front doors")
    assert score["wer"] == pytest.approx(1 / 3)
    assert score["cer"] == pytest.approx(1 / 12)
    chinese = word_errors("今天天气很好", "今天天很好", "zh")
    assert chinese["wer"] == chinese["cer"] == pytest.approx(1 / 6)


def test_both_sides_are_kept_as_they_came():
    score = word_errors("Dr. Smith!", "Doctor smith")
    assert (score["text"], score["heard"]) == ("Dr. Smith!", "Doctor smith")
    assert score["reference"] == score["hypothesis"] == "doctor smith"


@pytest.mark.parametrize(
    ("heard", "tail", "missing"),
    [
        ("we opened the front door", 0, 0),
        ("we opened the front door and so on and on", 5, 0),
        ("we opened the front doors and so on", 3, 0),
        ("we opened the front door we opened the front door", 5, 0),
        ("and so we opened the front door", 0, 0),
        ("we opened the", 0, 2),
        ("we opened a", 0, 2),
        ("opened the front door", 0, 0),
        ("", 0, 5),
    ],
)
def test_words_after_the_end_and_ends_that_are_missing_are_counted_apart(heard, tail, missing):
    score = word_errors("We opened the front door.", heard)
    assert (score["tail_insertions"], score["tail_deletions"]) == (tail, missing)


def test_a_surplus_costs_one_error_a_word():
    assert surplus(["a", "b", "c", "d"], ["a", "b"]) == 2
    assert surplus(["a", "b"], ["a", "b", "c", "d"]) == 0
    assert surplus(["x", "y"], ["a", "b"]) == 0
    assert surplus([], ["a"]) == 0


def test_word_errors_count_each_kind():
    score = word_errors("The cat sat down here.", "the hat sat down right here")
    counts = [score[kind] for kind in ("hits", "substitutions", "deletions", "insertions")]
    assert counts == [4, 1, 0, 1]
    assert score["wer"] == pytest.approx(2 / 5)


def test_what_is_not_heard_is_word_error_rate_1():
    assert word_errors(DINNER, "")["wer"] == 1.0
    assert word_errors(DINNER, "")["deletions"] == 8


# -- recognizers


@pytest.mark.parametrize(
    ("name", "text"), [("rms-dinner", DINNER), ("kal16-dinner", DINNER), ("rms-door", "We opened the front door.")]
)
def test_pocketsphinx_understands_clean_speech(pocketsphinx, name, text):
    assert word_errors(text, pocketsphinx.transcribe(*clip(name)))["wer"] == 0


def test_pocketsphinx_hears_the_same_at_another_rate_and_level(pocketsphinx):
    wave, rate = clip("rms-dinner")
    at_24k = asr.librosa.resample(wave, orig_sr=rate, target_sr=24_000)
    assert pocketsphinx.transcribe(0.05 * at_24k, 24_000) == normalize(DINNER)


@pytest.mark.slow
def test_pocketsphinx_forgets_what_it_heard_before(pocketsphinx):
    first = pocketsphinx.transcribe(*clip("kal16-dinner"))
    pocketsphinx.transcribe(noise(1.0), RATE)
    assert pocketsphinx.transcribe(*clip("kal16-dinner")) == first


@pytest.mark.slow
def test_pocketsphinx_hears_damage(pocketsphinx):
    wave, rate = clip("rms-dinner")
    damaged = wave + 0.1 * noise(len(wave) / rate)
    assert word_errors(DINNER, pocketsphinx.transcribe(damaged, rate))["wer"] > 0.3


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32)


def test_whisper_loads_a_local_folder_and_hears_short_and_long(tmp_path):
    save_tiny_whisper(tmp_path)
    whisper = asr.create_transcriber("whisper", str(tmp_path))
    assert whisper.understands("en-GB")
    assert not whisper.understands("fr")
    for seconds in (1.0, 35.0):
        heard = whisper.transcribe(0.1 * noise(seconds), RATE)
        assert heard == whisper.transcribe(0.1 * noise(seconds), RATE)
        assert "<|" not in heard


def save_tiny_whisper(folder: Path) -> None:
    """A Whisper of upstream's architecture with random weights and 27 characters for a vocabulary."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    controls = "endoftext startoftranscript en translate transcribe startoflm startofprev nospeech notimestamps"
    marks = [f"<|{control}|>" for control in controls.split()]
    stamps = [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
    vocabulary = {token: i for i, token in enumerate([*"abcdefghijklmnopqrstuvwxyz", "Ġ", *marks, *stamps])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), vocabulary["<|endoftext|>"])
    ends["decoder_start_token_id"] = vocabulary["<|startoftranscript|>"]
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in TINY_SIZES.items()}
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, d_model=16, max_target_positions=32, **sizes, **ends
    )
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(config)
    network.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": vocabulary["<|en|>"]},
        task_to_id={task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        prev_sot_token_id=vocabulary["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=20,
        **ends,
    )
    network.save_pretrained(folder)


TINY_SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


# -- speaker encoders


def test_resemblyzer_tells_voices_apart(resemblyzer):
    rms, same, other = (resemblyzer.embed(voice(name)) for name in ("rms-dinner", "rms-door", "kal16-dinner"))
    assert np.linalg.norm(rms) == pytest.approx(1, abs=1e-5)
    assert speaker.similarity(rms, same) > 0.8
    assert speaker.similarity(rms, same) > speaker.similarity(rms, other) + 0.1


def voice(name: str) -> np.ndarray:
    return speaker.voice_in(*clip(name))


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(3 * RATE),
        0.1 * np.random.default_rng(0).standard_normal(3 * RATE),
        0.1 * np.convolve(np.random.default_rng(1).standard_normal(3 * RATE), np.hanning(50), "same"),
        0.1 * np.sin(2 * np.pi * 220 * np.arange(3 * RATE) / RATE),
        0.1 * (120 * np.arange(3 * RATE) / RATE % 1 - 0.5),
        np.full(3 * RATE, 0.1),
        np.zeros(0),
        np.full(50, 0.1),
    ],
    ids=["silence", "white noise", "dark noise", "tone", "buzz", "constant", "empty", "short"],
)
def test_no_voice_is_in_what_is_none(sound):
    assert len(speaker.voice_in(sound.astype(np.float32), RATE)) == 0


def test_a_voice_is_as_long_as_somebody_speaks():
    wave, _ = clip("rms-dinner")
    spoken = len(speaker.voice_in(wave, RATE))
    assert 0.8 * len(wave) < spoken <= len(wave)
    padded = np.concatenate([np.zeros(2 * RATE), wave, np.zeros(5 * RATE)]).astype(np.float32)
    assert len(speaker.voice_in(padded, RATE)) == pytest.approx(spoken, rel=0.1)


def stored(wave: np.ndarray, rate: int, path: Path, new_rate: int, subtype: str = "PCM_16") -> Path:
    soundfile.write(path, asr.librosa.resample(wave, orig_sr=rate, target_sr=new_rate, axis=0), new_rate, subtype)
    return path


@pytest.mark.parametrize(
    ("store", "least"),
    [
        (lambda w, p: stored(np.stack([w, np.zeros_like(w)], axis=1), RATE, p, RATE), 0.999),
        (lambda w, p: stored(np.stack([np.zeros_like(w), w], axis=1), RATE, p, RATE), 0.999),
        (lambda w, p: stored(np.stack([w, -w], axis=1), RATE, p, RATE), 0.999),
        (lambda w, p: stored(w, RATE, p, 48_000), 0.99),
        (lambda w, p: stored(w, RATE, p, 8_000, "ULAW"), 0.9),  # half of the spectrum is gone
        (lambda w, p: stored(0.03 * w, RATE, p, RATE), 0.99),
        (lambda w, p: stored(1.5 * w, RATE, p, RATE), 0.99),
    ],
    ids=["right side silent", "left side silent", "sides opposite", "48 kHz", "8 kHz mu-law", "30 dB lower", "louder"],
)
def test_a_clip_sounds_like_itself_however_it_is_stored(tmp_path, resemblyzer, store, least):
    wave, _ = clip("rms-dinner")
    heard = speaker.voice_in(*scoring.read_wave(store(wave, tmp_path / "clip.wav")))
    assert speaker.similarity(resemblyzer.embed(heard), resemblyzer.embed(voice("rms-dinner"))) > least


def test_wavlm_loads_a_local_folder_and_its_metric_bears_the_name(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path / "wavlm-large-sv"
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        tdnn_dim=(16,) * 5,
        xvector_output_dim=8,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    wavlm = speaker.create_encoder("wavlm", str(folder))
    assert wavlm.metric_name == "sim_wavlm_large_sv"
    embedding = wavlm.embed(voice("rms-dinner"))
    assert embedding.shape == (8,)
    assert speaker.similarity(embedding, embedding) == pytest.approx(1, abs=1e-5)


def test_the_default_wavlm_is_not_called_large():
    assert speaker.metric_name(speaker.WAVLM) == "sim_wavlm_base_plus_sv"


@pytest.mark.parametrize(
    ("create", "name", "setting"),
    [(asr.create_transcriber, "whisper", "quality.asr"), (speaker.create_encoder, "wavlm", "quality.speaker")],
)
def test_a_model_that_does_not_load_is_named_with_the_ways_out(tmp_path, create, name, setting):
    with pytest.raises(UserError, match=f"{setting}_model: {tmp_path}.*{setting}=") as error:
        create(name, str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"{setting}=nobody"):
        create("nobody")


# -- the watermark


@pytest.mark.parametrize("name", ["rms-dinner", "kal16-dinner", "rms-door"])
def test_the_mark_is_found_where_it_is_and_nowhere_else(perth_detector, name):
    assert perth_detector.read(*marked(name)) > 0.9
    assert perth_detector.read(*clip(name)) < 0.4


@pytest.mark.parametrize(
    "handle",
    [
        lambda wave: (np.round(wave * 32767) / 32767, RATE),
        lambda wave: (wave[4000:12000], RATE),
        lambda wave: (0.1 * wave, RATE),
        lambda wave: (asr.librosa.resample(wave, orig_sr=RATE, target_sr=24_000), 24_000),
        lambda wave: (asr.librosa.resample(wave, orig_sr=RATE, target_sr=8_000), 8_000),
    ],
    ids=["16 bits", "half a second", "quieter", "24 kHz", "8 kHz"],
)
def test_handling_a_clip_neither_hides_the_mark_nor_makes_one(perth_detector, handle):
    assert round(perth_detector.read(*handle(marked("rms-dinner")[0]))) == 1
    assert round(perth_detector.read(*handle(clip("rms-dinner")[0]))) == 0


@pytest.mark.parametrize("wave", [np.zeros(0), np.full(500, 0.1), np.zeros(RATE)], ids=["empty", "short", "silent"])
def test_no_mark_fits_into_nothing(perth_detector, wave):
    assert perth_detector.read(wave.astype(np.float32), RATE) == 0.0


def test_without_perth_nobody_answers(monkeypatch):
    monkeypatch.setattr("perth.PerthImplicitWatermarker", None)
    assert watermark.create_detector() is None


# -- signals


def test_level_of_a_full_scale_sine_is_minus_3_db():
    sine = np.sin(np.linspace(0, 200 * np.pi, RATE, endpoint=False))
    assert signals.level_dbfs(sine) == pytest.approx(-3.01, abs=0.01)
    assert signals.level_dbfs(np.zeros(10)) == float("-inf")


@pytest.mark.parametrize(
    ("wave", "word"),
    [
        (np.zeros(0), "empty"),
        (np.zeros(100), "silent"),
        (np.full(100, 5e-4), "silent"),
        (np.array([0.1, np.nan]), "finite"),
    ],
)
def test_a_flaw_is_found_and_named(wave, word):
    assert word in signals.flaw(wave)
    assert signals.flaw(clip("rms-dinner")[0]) is None


def test_distances_are_zero_for_equal_waves_and_grow_with_noise():
    wave, rate = clip("rms-dinner")
    hiss = noise(len(wave) / rate)
    for distance in (signals.relative_error, signals.log_spectral_distance):
        near, far = distance(wave + 1e-3 * hiss, wave), distance(wave + 1e-2 * hiss, wave)
        assert distance(wave, wave) == 0 < near < far
    assert signals.relative_error(1.5 * wave, wave) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="shapes"):
        signals.relative_error(wave[1:], wave)


def test_spectral_distance_does_not_mind_phase_and_reads_in_decibels():
    wave, _ = clip("rms-dinner")
    assert signals.log_spectral_distance(-wave, wave) == 0
    assert signals.log_spectral_distance(wave * 10 ** (6 / 20), wave) == pytest.approx(6, abs=1.0)
    assert signals.relative_error(-wave, wave) == pytest.approx(2)


# -- scoring a run


def measurement(text_id: str, clip_name: str | None, text: str = DINNER, **changes) -> Measurement:
    audio = f"audio/baseline/{clip_name}.wav" if clip_name else None
    values = {
        "variant": "baseline",
        "pass_name": "quality",
        "text_id": text_id,
        "text": text,
        "voice": "rms",
        "seed": 1,
    }
    return Measurement(**values | {"audio": audio} | changes)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "combo", "mini")
    audio = folder.path / "audio/baseline"
    audio.mkdir(parents=True)
    for path in SPEECH.glob("*.ogg"):
        soundfile.write(audio / f"{path.stem}.wav", *clip(path.stem))
    soundfile.write(audio / "silent.wav", np.zeros(RATE), RATE)
    (audio / "damaged.wav").write_bytes(b"not a sound file")
    return folder


def scores(rows, folder, pocketsphinx, resemblyzer, detector=None, reference=lambda voice: clip("rms-door"), **more):
    judges = scoring.Judges(pocketsphinx, resemblyzer, detector)
    return scoring.score_rows(rows, folder.path, judges, reference, **more)


def test_a_good_clip_scores_well_and_another_voice_or_text_shows(folder, pocketsphinx, resemblyzer):
    rows = [
        measurement("good", "rms-dinner"),
        measurement("wrong voice", "kal16-dinner"),
        measurement("wrong text", "rms-dinner", text="We opened the front door."),
    ]
    good, wrong_voice, wrong_text = scores(rows, folder, pocketsphinx, resemblyzer)
    assert (good.wer, good.hits, good.missing, good.reason) == (0.0, 8, False, None)
    assert good.similarity["sim_resemblyzer"] > 0.8 > wrong_voice.similarity["sim_resemblyzer"]
    assert wrong_voice.wer == 0.0
    assert wrong_text.wer >= 1.0
    assert [score.work for score in (good, wrong_voice, wrong_text)] == [row.work for row in rows]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (measurement("t", None), "no audio file"),
        (measurement("t", "absent"), "no audio file"),
        (measurement("t", "silent"), "silent"),
        (measurement("t", "damaged"), "damaged"),
        (measurement("t", "rms-dinner", non_finite=True), "not finite"),
        (measurement("t", "rms-dinner", status="failed", error="Traceback\nKeyError: 'x'"), "KeyError: 'x'"),
    ],
)
def test_a_clip_that_cannot_be_judged_counts_as_wholly_wrong(
    folder, pocketsphinx, resemblyzer, perth_detector, row, reason
):
    (score,) = scores([row], folder, pocketsphinx, resemblyzer, perth_detector)
    assert (score.wer, score.deletions, score.similarity) == (1.0, 8, {"sim_resemblyzer": 0.0})
    assert score.watermark == 0.0
    assert score.missing
    assert reason in score.reason


def test_the_watermark_is_read_from_the_file_and_unknown_where_nobody_can_read_it(
    folder, pocketsphinx, resemblyzer, perth_detector
):
    soundfile.write(folder.path / "audio/baseline/marked.wav", *marked("rms-dinner"), subtype="PCM_16")
    rows = [measurement("with", "marked"), measurement("without", "rms-dinner")]
    found = scores(rows, folder, pocketsphinx, resemblyzer, perth_detector)
    assert [round(score.watermark) for score in found] == [1, 0]
    assert [score.watermark for score in scores(rows, folder, pocketsphinx, resemblyzer)] == [None, None]


@pytest.mark.slow
def test_a_little_voice_is_not_judged_where_the_text_is_short_and_counts_as_nobodys_where_it_is_not(
    folder, pocketsphinx, resemblyzer
):
    wave, _ = clip("rms-dinner")
    said = np.concatenate([wave[4000:14000], np.zeros(3 * RATE)])
    soundfile.write(folder.path / "audio/baseline/little.wav", said, RATE)
    soundfile.write(folder.path / "audio/baseline/noise.wav", 0.1 * noise(3.0), RATE)
    rows = [
        measurement("short", "little", text="How many?"),
        measurement("long", "little"),
        measurement("noise", "noise", text="How many?"),
    ]
    short, long, nobody = scores(rows, folder, pocketsphinx, resemblyzer)
    assert 0 < short.voiced_s < 1
    assert short.similarity == {"sim_resemblyzer": None}
    assert "similarity is not judged" in short.reason
    assert long.similarity == nobody.similarity == {"sim_resemblyzer": 0.0}
    assert "too little for the text" in long.reason
    assert not long.missing
    (unknown,) = scores(rows[:1], folder, pocketsphinx, resemblyzer, reference=lambda voice: (0.1 * noise(3.0), RATE))
    assert unknown.similarity == {"sim_resemblyzer": None}
    assert "reference clip of the voice rms has 0.0 s of voice" in unknown.reason


def test_words_are_not_judged_in_a_language_that_the_recognizer_does_not_know(folder, pocketsphinx, resemblyzer):
    (score,) = scores([measurement("t", "rms-dinner")], folder, pocketsphinx, resemblyzer, language="fr")
    assert (score.wer, score.cer) == (None, None)
    assert "does not know the language fr" in score.reason
    assert score.similarity["sim_resemblyzer"] > 0.8


def test_pace_and_a_cut_at_the_limit_are_told_of_each_clip(folder, pocketsphinx, resemblyzer):
    row = measurement("t", "rms-dinner", hit_token_cap=True)
    (score,) = scores([row], folder, pocketsphinx, resemblyzer)
    assert score.hit_token_cap
    assert score.seconds_per_character == pytest.approx(len(clip("rms-dinner")[0]) / RATE / len(DINNER))


def test_without_a_reference_clip_similarity_is_unknown_rather_than_zero(folder, pocketsphinx, resemblyzer):
    rows = [measurement("t", "rms-dinner"), measurement("t", None)]
    good, missing = scores(rows, folder, pocketsphinx, resemblyzer, reference=lambda voice: None)
    assert good.wer == 0.0
    assert good.similarity == missing.similarity == {"sim_resemblyzer": None}
    assert "no reference clip of the voice rms" in good.reason
    assert not good.missing
    assert missing.missing


def test_a_voice_given_as_a_clip_is_its_own_reference():
    path = SPEECH / "rms-door.ogg"
    wave, rate = scoring.reference_wave(str(path))
    assert np.array_equal(wave, clip("rms-door")[0])
    assert rate == RATE
    assert scoring.reference_wave("nobody") is None


@pytest.mark.slow
def test_scoring_again_replaces_the_scores_however_many_processes(folder, monkeypatch):
    names = ["rms-dinner", "rms-door"] + ["silent"] * 14
    for number, name in enumerate(names):
        folder.add_measurement(measurement(f"t{number}", name, voice=str(SPEECH / "rms-door.ogg")))
    folder.add_measurement(measurement("t0", None, pass_name="speed"))
    folder.add_measurement(measurement("t0", "rms-dinner", pass_name="warmup"))
    scoring.score_run(folder, {})
    first, warnings = folder.scores()
    monkeypatch.setattr(scoring, "PROCESSES", 1)
    scoring.score_run(folder, {"asr": "pocketsphinx", "speaker": "resemblyzer"})
    assert folder.scores() == (first, warnings) == (first, [])
    assert [score.text_id for score in first] == [f"t{number}" for number in range(16)]
    assert [score.missing for score in first] == [name == "silent" for name in names]
    assert first[0].wer == 0.0
    assert first[1].similarity["sim_resemblyzer"] == pytest.approx(1, abs=0.01)  # the reference itself


def test_scores_survive_judges_that_do_not_load(folder):
    folder.add_measurement(measurement("t", "rms-dinner"))
    scoring.score_run(folder, {})
    before = folder.scores_file.read_bytes()
    with pytest.raises(UserError, match=r"quality\.asr=nobody"):
        scoring.score_run(folder, {"asr": "nobody"})
    assert folder.scores_file.read_bytes() == before


def test_clips_that_were_left_behind_are_not_judged_as_missing(folder):
    folder.add_measurement(measurement("t", "rms-dinner"))
    clips = list(folder.path.rglob("*.wav"))
    folder.write_json("summary.json", {"files": {path.relative_to(folder.path).as_posix(): "0" for path in clips}})
    folder.scores_file.write_text("as they were")
    for path in clips:
        path.unlink()
    with pytest.raises(UserError, match=r"of its clips are not here \(audio/.*copy them"):
        scoring.score_run(folder, {})
    assert folder.scores_file.read_text() == "as they were"


@pytest.mark.parametrize(
    "config", [{"asr": "whispr"}, {"speaker": "nobody"}, {"asr": "whisper", "asr_model": "/nowhere"}]
)
def test_judges_are_checked_before_anything_is_measured(config):
    judges.check_judges({})
    with pytest.raises(UserError, match=r"quality\."):
        judges.check_judges(config)


def test_a_run_without_clips_has_no_scores(folder):
    folder.add_measurement(measurement("t0", None, pass_name="speed"))
    scoring.score_run(folder, {})
    assert not folder.scores_file.exists()


def test_a_timed_clip_that_was_kept_is_judged_too(folder):
    folder.add_measurement(measurement("t0", "rms-dinner", pass_name="speed", round=3))
    folder.add_measurement(measurement("t0", "absent", pass_name="speed", seed=2))
    scoring.score_run(folder, {})
    heard, missing = folder.scores()[0]
    assert (heard.pass_name, heard.wer, heard.missing) == ("speed", 0.0, False)
    assert (missing.pass_name, missing.wer, missing.missing) == ("speed", 1.0, True)
