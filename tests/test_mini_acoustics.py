"""The flow, HiFT and Vocos stages of the miniature: their losses, their data and that they learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness import checkpoints
from harness.errors import UserError
from harness.mini import models, vocos
from harness.mini.inverse_stft import inverse_stft
from harness.mini.training import distill_vocos, flow, hift, vocoder
from harness.mini.training import vocos as vocos_training
from harness.mini.training.losses import Critics, SpectralLoss, critic_loss, deception_loss, feature_loss
from harness.mini.training.run import Run
from harness.mini.training.speech import Corpus


def tone(hertz: float, seconds: float, rate: int = 16_000) -> torch.Tensor:
    """A voice-like tone: seven harmonics, softer with height."""
    time = torch.arange(int(seconds * rate)) / rate
    return sum(0.1 / k * torch.sin(2 * torch.pi * k * hertz * time) for k in range(1, 8))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Sixteen utterances of 2 to 2.5 s: four voices that only hum, each at its own pitch, with pauses around."""
    rng = np.random.default_rng(0)
    voices = np.arange(16) % 4
    audio = []
    for voice in voices:
        hum = tone(100 + 40 * voice, 1.8 + 0.5 * rng.random()).numpy()
        quiet = np.zeros(1600)
        wave = np.concatenate([quiet, hum, quiet]) + 1e-3 * rng.standard_normal(len(hum) + 3200)
        audio.append((wave * 32767).astype(np.int16))
    lengths = np.array([len(wave) for wave in audio])
    return Corpus(
        audio=np.concatenate(audio),
        phones=np.zeros(1, np.int8),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
        phone_starts=np.zeros(16, np.int64),
        voices=voices,
        texts=["hum"] * 16,
    )


@pytest.fixture(scope="module")
def lines(corpus: Corpus) -> flow.Lines:
    """The corpus laid out with made-up tokens that name their utterance and count its tokens."""
    lengths = torch.from_numpy(corpus.lengths) // 640 + 1  # a tokenizer counts a last partial frame, the mel does not
    tokens = torch.cat([100 * i + torch.arange(n) for i, n in enumerate(lengths.tolist())])
    return flow.lay_out(corpus, tokens, lengths.cumsum(0) - lengths, lengths, "cpu")


# -- losses ------------------------------------------------------------------------------------------------------------


def test_spectral_loss_is_zero_for_equal_waves_and_grows_with_noise():
    wave = tone(150, 0.4, 24_000).repeat(2, 1)
    noise = torch.randn_like(wave)
    loss = SpectralLoss()
    distances = [sum(loss(wave + level * noise, wave).values()) for level in (0.0, 0.003, 0.03)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_spectral_loss_has_a_finite_gradient_at_silence():
    silence = torch.zeros(1, 4800, requires_grad=True)
    sum(SpectralLoss()(silence, torch.zeros(1, 4800)).values()).backward()
    assert silence.grad.isfinite().all()


def test_critics_learn_to_tell_a_tone_from_noise():
    torch.manual_seed(0)
    critics = Critics(periods=(2, 5), windows=(512,))
    optimizer = torch.optim.Adam(critics.parameters(), 1e-3)
    real, fake = tone(150, 0.2, 24_000).repeat(2, 1), 0.1 * torch.randn(2, 4800)
    losses = []
    for _ in range(15):
        loss = critic_loss(critics(fake), critics(real))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert deception_loss(critics(fake)) > deception_loss(critics(real))
    assert feature_loss(critics(fake), critics(real)) > feature_loss(critics(real), critics(real)) == 0


# -- flow --------------------------------------------------------------------------------------------------------------


def test_lines_hold_every_utterance_once_and_voices_apart(corpus: Corpus, lines: flow.Lines):
    counts = corpus.lengths // 640
    assert len(lines.tokens) == counts.sum()
    assert lines.mel.shape == (2 * counts.sum(), 80)
    for voice, (start, stop) in enumerate(lines.bounds.tolist()):
        utterances = (lines.tokens[start:stop] // 100).unique()
        assert utterances.tolist() == [voice, voice + 4, voice + 8, voice + 12]


def test_line_mel_is_upstreams_mel_of_the_utterance(corpus: Corpus, lines: flow.Lines):
    start, length = corpus.starts[5], corpus.lengths[5]
    wave = torch.from_numpy(corpus.audio[start : start + length].astype(np.float32) / 32768)[None]
    alone = models.mel_spectrogram(vocoder.features.wav24(wave))[0].T
    at = torch.nonzero(lines.tokens // 100 == 5).squeeze(1)
    joined = lines.mel[2 * at[0] : 2 * at[-1] + 2].float()
    inner = slice(3, len(joined) - 3)  # frames at a seam see the neighbour's silence
    assert (joined[inner] - alone[: len(joined)][inner]).abs().max() < 0.05


def test_windows_stay_inside_their_voice_and_touch_an_utterance_border(lines: flow.Lines):
    window = lines.draw(64, 30, torch.Generator().manual_seed(0))
    assert window.tokens.shape == (64, 30)
    assert window.mel.shape == (64, 80, 60)
    assert torch.equal(window.tokens // 100 % 4, window.voices[:, None].expand(-1, 30))
    last = {i: int(lines.tokens[lines.tokens // 100 == i].max()) for i in range(16)}
    begins = window.tokens[:, 0] % 100 == 0
    ends = torch.tensor([int(t) == last[int(t) // 100] for t in window.tokens[:, -1]])
    assert (begins | ends).all()
    assert 10 < begins.sum() < 54


def test_windows_carry_the_mel_of_their_tokens(lines: flow.Lines):
    window = lines.draw(8, 30, torch.Generator().manual_seed(1))
    for row in range(8):
        at = torch.nonzero(lines.tokens == window.tokens[row, 7]).item()
        assert torch.equal(window.mel[row, :, 14:16], lines.mel[2 * at : 2 * at + 2].float().T)


def test_split_takes_the_end_of_every_line(lines: flow.Lines):
    train, rest = lines.split(0.25)
    assert torch.equal(train.bounds[:, 1], rest.bounds[:, 0])
    assert torch.equal(train.bounds[:, 0], lines.bounds[:, 0])
    assert torch.equal(rest.bounds[:, 1], lines.bounds[:, 1])
    sizes = (rest.bounds[:, 1] - rest.bounds[:, 0]) / (lines.bounds[:, 1] - lines.bounds[:, 0])
    assert ((sizes > 0.2) & (sizes < 0.3)).all()


def loss_of(model, window: flow.Window, prompts: torch.Tensor) -> torch.Tensor:
    speakers = torch.ones(len(window.tokens), 192)
    rng = torch.Generator().manual_seed(3)
    lesson = flow.draw_lesson(window, speakers, prompts, model.decoder.training_cfg_rate, rng)
    return flow.matching_loss(model, lesson)


def test_flow_loss_scores_only_what_is_behind_the_prompt(lines: flow.Lines):
    """A row that is all prompt but for one frame weighs as one frame; the prompt's own error does not count."""
    torch.manual_seed(0)
    model = models.build_s3gen().flow.eval()
    model.decoder.training_cfg_rate = 1.0  # told nothing, so the prompt can only enter through the score
    window = lines.draw(1, 30, torch.Generator().manual_seed(2))
    prompts = torch.tensor([40])
    scored = {}

    def zero_velocity(x: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        scored["mel"] = window.mel
        return torch.zeros_like(x)

    model.decoder.estimator.forward = zero_velocity
    before = loss_of(model, window, prompts)
    prompt_changed = window.mel.clone()
    prompt_changed[:, :, :40] += 5
    speech_changed = window.mel.clone()
    speech_changed[:, :, 40:] += 5
    assert loss_of(model, flow.Window(window.voices, window.tokens, prompt_changed), prompts) == before
    assert loss_of(model, flow.Window(window.voices, window.tokens, speech_changed), prompts) != before


def test_guidance_rows_are_told_nothing(lines: flow.Lines):
    torch.manual_seed(0)
    model = models.build_s3gen().flow.eval()
    model.decoder.training_cfg_rate = 0.5
    window = lines.draw(16, 30, torch.Generator().manual_seed(2))
    told = {}

    def spy(x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        told.update(inputs)
        return x

    model.decoder.estimator.forward = spy
    loss_of(model, window, torch.full((16,), 20))
    silent = (told["mu"] == 0).all(2).all(1)
    assert 0 < silent.sum() < 16
    assert torch.equal(silent, (told["cond"] == 0).all(2).all(1))
    assert torch.equal(silent, (told["spks"] == 0).all(1))
    assert torch.equal(told["cond"][~silent][:, :, :20], window.mel[~silent][:, :, :20])
    assert (told["cond"][:, :, 20:] == 0).all()


def test_flow_training_reads_upstream_inference_inputs(lines: flow.Lines, monkeypatch: pytest.MonkeyPatch):
    """What the estimator is given in training, prompt and all, is what upstream's inference gives it."""
    torch.manual_seed(0)
    model = models.build_s3gen().flow.eval()
    model.decoder.training_cfg_rate = 0.0
    window = lines.draw(1, 30, torch.Generator().manual_seed(2))
    seen: list[dict[str, torch.Tensor]] = []

    def spy(x: torch.Tensor, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        seen.append({name: inputs[name][:1].clone() for name in ("mu", "spks", "cond")} | {"mask": mask[:1]})
        return torch.zeros_like(x)

    model.decoder.estimator.forward = spy
    with torch.no_grad():
        loss_of(model, window, torch.tensor([20]))
        flow.generate(model, window, torch.ones(1, 192), prompt=10)
    training, inference = seen[0], seen[1]
    for name in ("mu", "spks", "cond", "mask"):
        torch.testing.assert_close(training[name], inference[name], rtol=1e-4, atol=1e-5)


def test_mask_helper_is_replaced_only_for_a_while(lines: flow.Lines):
    original = flow.upstream_decoder.add_optional_chunk_mask
    with flow.no_chunk_masks():
        assert flow.upstream_decoder.add_optional_chunk_mask is not original
    assert flow.upstream_decoder.add_optional_chunk_mask is original


@pytest.mark.slow
def test_flow_stage_trains_saves_and_loads_into_upstreams_class(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(flow, "TOKENS_A_STEP", 90)
    monkeypatch.setattr(flow, "WINDOWS", (30, 45))
    monkeypatch.setattr(flow, "CLIPS", 1)
    run = Run(tmp_path, device="cpu", seed=1, scale=20 / flow.STEPS)
    torch.manual_seed(0)
    speakers = models.build_s3gen().speaker_encoder.state_dict()
    run.save("speakers", {f"speaker_encoder.{name}": t for name, t in speakers.items()})
    lengths = corpus.lengths // 640
    codes = models.CODES.start + np.arange(lengths.sum()) % 50
    np.savez(tmp_path / "tokens.npz", tokens=codes.astype(np.int16), starts=lengths.cumsum() - lengths, lengths=lengths)

    untrained = models.build_s3gen().flow
    figures = flow.train(corpus, run)
    assert np.isfinite(figures["mel_l1"])
    trained = models.build_s3gen().flow
    trained.load_state_dict(run.load("flow"))

    tokens = map(torch.from_numpy, (codes, lengths.cumsum() - lengths, lengths))
    lines = flow.lay_out(corpus, *tokens, "cpu")
    bank = torch.ones(4, 1, 192)
    lesson = flow.draw(trained, lines, bank, 45, 360, torch.Generator().manual_seed(5))
    with torch.no_grad():
        losses = [float(flow.half_precision_loss(m.eval(), lesson)) for m in (untrained, trained)]
    assert losses[1] < losses[0]


# -- HiFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hertz", [70, 110, 150, 220, 380])
def test_pitch_of_a_tone(hertz: float):
    found = hift.pitch(tone(hertz, 1.0)[None] + 1e-3 * torch.randn(1, 16_000))
    assert found.shape == (1, 50)
    assert (found[:, 4:-4] - hertz).abs().max() < 0.005 * hertz


def test_pitch_is_zero_in_noise_and_silence():
    assert (hift.pitch(0.1 * torch.randn(2, 16_000)) == 0).float().mean() > 0.95
    assert (hift.pitch(torch.zeros(1, 16_000)) == 0).all()


def test_pitch_frames_align_with_mel_frames(corpus: Corpus):
    """The hum begins and ends in the same frames for both."""
    crops = vocoder.SpeechCrops.of(corpus, torch.Generator().manual_seed(0))
    mel, pitch = hift.mel_and_pitch(crops, 16, 60)
    assert mel.shape == (16, 80, 60)
    assert pitch.shape == (16, 60)
    loud = mel.mean(1) > -7
    assert ((pitch > 0) == loud).float().mean() > 0.93


def test_crops_pair_mel_and_wave(corpus: Corpus):
    crops = vocoder.SpeechCrops.of(corpus, torch.Generator().manual_seed(0))
    mel, wave = crops.draw(3, 20)
    assert mel.shape == (3, 80, 20)
    assert wave.shape == (3, 20 * 480)
    again = vocoder.features.mel80(wave)
    torch.testing.assert_close(mel[:, :, 3:-3], again[:, :, 3:-3], rtol=0, atol=0.02)


def quick(steps: int) -> vocoder.Recipe:
    return vocoder.Recipe(steps, batch=2, frames=16, critics_from=0.5)


@pytest.mark.slow
def test_hift_stage_trains_saves_and_loads_into_upstreams_class(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hift, "Recipe", quick)
    monkeypatch.setattr(hift, "PITCH_STEPS", 6)
    monkeypatch.setattr(hift, "STEPS", 6)
    monkeypatch.setattr(hift, "POLISH_STEPS", 4)
    figures = hift.train(corpus, Run(tmp_path, device="cpu"))
    assert all(np.isfinite(figures[name]) for name in ("stft", "mel", "voicing_error"))
    state = Run(tmp_path, device="cpu").load("hift")
    assert "conv_pre.parametrizations.weight.original0" in state
    upstream = models.build_s3gen().mel2wav
    upstream.load_state_dict(state)
    wave, _ = upstream.inference(torch.randn(1, 80, 12) - 5)
    assert wave.shape == (1, 12 * 480)


@pytest.mark.slow
def test_pitch_predictor_learns(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hift, "PITCH_STEPS", 30)
    torch.manual_seed(0)
    predictor = models.build_s3gen().mel2wav.f0_predictor
    crops = vocoder.SpeechCrops.of(corpus, torch.Generator().manual_seed(0))
    mel, target = hift.mel_and_pitch(crops, 4, 60)
    before = F.l1_loss(predictor(mel), target)
    hift.train_pitch(predictor, crops, 4, Run(tmp_path, device="cpu"))
    mel, target = hift.mel_and_pitch(crops, 4, 60)
    assert F.l1_loss(predictor(mel), target) < 0.5 * before


# -- Vocos -------------------------------------------------------------------------------------------------------------

TINY = vocos.Hparams(dim=24, intermediate_dim=48, num_layers=2)


def test_vocos_gives_480_samples_a_frame_and_stays_small():
    model = vocos.build()
    assert model(torch.randn(2, 80, 11)).shape == (2, 11 * 480)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_vocos_survives_saving(tmp_path: Path):
    torch.manual_seed(0)
    model = vocos.build(TINY).eval()
    vocos.save(model, tmp_path / "v.safetensors")
    loaded = vocos.load(tmp_path / "v.safetensors")
    assert loaded.hparams == TINY
    mel = torch.randn(1, 80, 20)
    torch.testing.assert_close(loaded(mel), model(mel), rtol=0, atol=2e-3 * float(model(mel).abs().max()))


def test_vocos_load_explains_itself(tmp_path: Path):
    with pytest.raises(UserError, match="distill_vocos"):
        vocos.load(tmp_path / "missing.safetensors")
    Run(tmp_path, device="cpu").save("other", {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="no Vocos"):
        vocos.load(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_training_brings_vocos_nearer_to_the_speech(corpus: Corpus, tmp_path: Path):
    torch.manual_seed(0)
    crops = vocoder.SpeechCrops.of(corpus, torch.Generator().manual_seed(0))
    model = vocos.build(TINY)
    before = vocoder.distance(model, crops, 4, 16)
    rng = torch.Generator().manual_seed(0)
    vocoder.fit("vocos", model, model, crops, quick(12), rng, Run(tmp_path, device="cpu"))
    after = vocoder.distance(model, crops, 4, 16)
    assert after["mel"] < 0.8 * before["mel"]


@pytest.mark.slow
def test_vocoder_training_resumes(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vocoder, "CHECKPOINT_EVERY", 3)
    crops = vocoder.SpeechCrops.of(corpus, torch.Generator().manual_seed(0))
    run = Run(tmp_path, device="cpu")
    for steps in (4, 5):  # the first run is cut off behind its checkpoint at step 3
        model = vocos.build(TINY)
        vocoder.fit("vocos", model, model, crops, quick(steps), torch.Generator().manual_seed(0), run)
    logged = (tmp_path / "vocos.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in logged] == ['{"step": 0', '{"step": 3', '{"step": 4']


def test_stage_writes_vocos_that_load_reads(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vocos_training, "Recipe", quick)
    monkeypatch.setattr(vocos_training, "STEPS", 3)
    monkeypatch.setattr(vocos_training, "POLISH_STEPS", 2)
    run = Run(tmp_path, device="cpu")
    figures = vocos_training.train(corpus, run)
    assert set(figures) == {"stft", "mel"}
    assert vocos.load(run.path("vocos"))(torch.zeros(1, 80, 5)).shape == (1, 2400)


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_distillation_learns_from_the_pipelines_own_vocoder(tmp_path: Path):
    pipeline = checkpoints.load("mini", "cpu")
    stage = pipeline.stages["mel_to_wave"]
    out = tmp_path / "made" / "v.safetensors"
    figures = distill_vocos.distill(pipeline, ["One.", "Two.", "Three."], out, quick(3), TINY)
    assert np.isfinite(figures["mel"])
    assert vocos.load(out).hparams == TINY
    assert pipeline.stages["mel_to_wave"] == stage


def test_lessons_are_hifts_answers_to_the_flows_mels():
    pipeline = checkpoints.load("mini", "cpu")
    lessons = distill_vocos.speak(pipeline, ["One."], seed=0, tell=lambda _: None)
    mel, wave = lessons[0]
    assert wave.shape == (mel.shape[1] * 480,)
    spoken = pipeline.synthesize("One.", "kal16", seed=0)
    assert len(spoken.wave) == len(wave) + distill_vocos.FADE * 480
    rng = torch.Generator().manual_seed(0)
    mels, waves = distill_vocos.SpokenPairs.of(lessons, rng).draw(4, 10)
    assert mels.shape == (4, 80, 10)
    starts = [torch.nonzero((mel == m[:, :1]).all(0))[0, 0] for m in mels]
    for start, crop in zip(starts, waves, strict=True):
        assert torch.equal(crop, wave[start * 480 : (start + 10) * 480])


def test_command_explains_a_missing_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status = distill_vocos.main(["--texts", str(tmp_path / "no.txt"), "--out", str(tmp_path / "v.safetensors")])
    assert status == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "hop"), [(16, 4), (1920, 480)])
def test_the_inverse_transform_is_pytorchs(n, hop):
    window = torch.hann_window(n)
    wave = torch.randn(2, 8 * n, generator=torch.Generator().manual_seed(0))
    spectrum = torch.stft(wave, n, hop, window=window, return_complex=True)
    ours = inverse_stft(spectrum, window, hop, n // 2)
    assert torch.allclose(ours, torch.istft(spectrum, n, hop, window=window), atol=1e-5)
    assert inverse_stft(spectrum, window, hop, (n - hop) // 2).shape[1] == spectrum.shape[2] * hop


def test_hift_speaks_in_training_as_it_does_in_upstreams_own_pass():
    model = models.build_s3gen().mel2wav
    model.m_source.l_sin_gen.noise_std = model.m_source.l_sin_gen.sine_amp = 0.0  # no random numbers
    mel = torch.randn(1, 80, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(hift.speak(model, mel), model.inference(mel)[0], atol=1e-5)
