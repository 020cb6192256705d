"""The miniature's T3 is trained in the layout it is run in, learns, and its aligned heads are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chatterbox.models.t3.modules.cond_enc import T3Cond

from harness.mini import models
from harness.mini.training import align
from harness.mini.training import t3 as training
from harness.mini.training.align import analyzer_reads, best_heads, generate, measure_heads, quiet, walk_mass
from harness.mini.training.muon import orthogonalize
from harness.mini.training.speech import Corpus
from harness.mini.training.t3 import Examples


@pytest.fixture
def model():
    torch.manual_seed(0)
    t3 = models.build_t3()
    training.initialize(t3, tokens_per_character=1.6)
    return t3.eval()


def made_up_corpus(letters: list[np.ndarray]) -> Corpus:
    """Every letter's phone lasts 80 ms: two speech tokens, four phone labels."""
    phones = np.concatenate([np.repeat(word, 4) for word in letters]).astype(np.int8)
    counts = np.array([4 * len(word) for word in letters])
    starts = np.cumsum(counts) - counts
    silence = np.zeros(320 * len(phones), np.int16)
    voices = np.arange(len(letters)) % 4
    return Corpus(silence, phones, 320 * starts, 320 * counts, starts, voices, texts=["?"] * len(letters))


def made_up_examples(n: int = 24, seed: int = 0) -> Examples:
    """A language anybody could learn: each letter is spoken as two tokens of its own."""
    rng = np.random.default_rng(seed)
    letters = [rng.integers(4, 30, size=rng.integers(6, 12)) for _ in range(n)]
    texts = [np.concatenate(([models.START_TEXT], word, [models.STOP_TEXT])) for word in letters]
    speech = [np.stack((word * 2, word * 2 + 1), 1).ravel() + models.CODES.start for word in letters]
    phones, progress = training.phones_ahead(made_up_corpus(letters), 2 * np.array([len(word) for word in letters]))
    text_lens, speech_lens = (np.array([len(row) for row in rows]) for rows in (texts, speech))
    return Examples(
        text=torch.from_numpy(np.concatenate(texts).astype(np.int16)),
        speech=torch.from_numpy(np.concatenate(speech).astype(np.int16)),
        text_lens=torch.from_numpy(text_lens),
        speech_lens=torch.from_numpy(speech_lens),
        phones=torch.from_numpy(phones),
        progress=torch.from_numpy(progress),
        voices=np.arange(n) % 4,
        speakers=torch.nn.functional.normalize(torch.rand(4, 3, 256), dim=-1),
        prompt_len=12,
    )


def test_training_forward_equals_upstreams_step_by_step_inference(model):
    """One batched pass over padded utterances gives the logits that `T3.inference` samples from."""
    examples = made_up_examples()
    batch = examples.batch(np.array([3, 5]), np.random.default_rng(0))
    assert batch.text_lens[0] != batch.text_lens[1]  # so that padding is put to the test
    seen: list[torch.Tensor] = []
    hook = model.speech_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits[:, -1]))
    for row in range(2):
        seen.clear()
        text = batch.text[row : row + 1, : batch.text_lens[row]]
        with quiet():
            tokens = model.inference(
                t3_cond=T3Cond(
                    speaker_emb=batch.speaker[row : row + 1],
                    cond_prompt_speech_tokens=batch.prompt[row : row + 1],
                    emotion_adv=0.5 * torch.ones(1, 1, 1),
                ),
                text_tokens=text.repeat(2, 1),
                max_new_tokens=11,
            )[0]
        steps = torch.stack(seen)  # [11 and the one after, CFG row, vocabulary]
        spoken = batch._replace(speech=batch.speech.clone(), speech_lens=batch.speech_lens.clone())
        spoken.speech[row, :11], spoken.speech_lens[row] = tokens[:11], 11
        with torch.no_grad():
            for cfg_row in range(2):
                dropped = torch.full((2,), bool(cfg_row))
                hidden = training.forward(model, spoken, text_dropped=dropped).hidden
                hidden = hidden.split((spoken.speech_lens + 1).tolist())[row]
                ours = model.speech_head(hidden)
                torch.testing.assert_close(ours, steps[:, cfg_row], atol=1e-4, rtol=0)
    hook.remove()


def test_packed_logits_give_upstreams_full_softmax(model):
    hidden = torch.randn(7, model.dim)
    full = model.speech_head(hidden).log_softmax(-1)
    packed = training.code_logits(model, hidden).log_softmax(-1)
    tokens = torch.tensor([models.CODES.start, models.CODES.stop - 1, model.hp.stop_speech_token])
    torch.testing.assert_close(packed[:, training.packed_ids(tokens)], full[:, tokens], atol=1e-4, rtol=1e-4)


def test_forward_without_dropout_is_deterministic(model):
    batch = made_up_examples().batch(np.arange(4), np.random.default_rng(0))
    first, second = (training.forward(model, batch).hidden for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(training.forward(model, batch, dropout=0.1).hidden, first)


def test_prompt_and_speaker_come_from_the_same_voice():
    examples = made_up_examples()
    rows = np.arange(8)
    batch = examples.batch(rows, np.random.default_rng(1))
    for row in rows:
        own = np.flatnonzero(examples.voices == row % 4)
        starts = examples.speech_spans[0, own]
        prompts = [examples.speech[start : start + batch.prompt.size(1)].long() for start in starts]
        assert any(torch.equal(batch.prompt[row], prompt) for prompt in prompts)
        assert (batch.speaker[row] == examples.speakers[row % 4]).all(-1).any()


def test_batches_hold_every_utterance_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(20, 200, 500)
    rows = np.arange(0, 500, 2)
    found = training.batches(lengths, rows, 1000, np.random.default_rng(0))
    costs = [len(batch) * lengths[batch].max() for batch in found]
    assert sorted(np.concatenate(found)) == list(rows)
    assert max(costs) <= 1000
    assert sum(costs) < 1.15 * lengths[rows].sum()


@pytest.mark.slow
def test_a_few_steps_learn_a_tiny_language(model):
    torch.manual_seed(0)
    model.tfmr.layers = model.tfmr.layers[:4]
    examples, rng = made_up_examples(12), np.random.default_rng(0)
    phone_head = training.build_phone_head(model)
    optimizers = training.optimizers(model, phone_head)
    nats, walk, phones = [], [], []
    for _ in range(14):
        batch = examples.batch(np.arange(len(examples)), rng)
        loss, parts = training.training_loss(model, phone_head, examples, batch, guide=0.3)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        nats.append(float(parts["nats"]))
        walk.append(float(parts["walk"]))
        phones.append(float(parts["phones"]))
    assert nats[-1] < 0.6 * nats[0]
    assert walk[-1] < 0.8 * walk[0]
    assert phones[-1] < 0.8 * phones[0]
    figures = training.validate(model, examples, np.arange(len(examples)))
    assert figures["nats"] < nats[-1]  # no dropout, no random tokens
    assert 0 < figures["accuracy"] <= 1


def test_guide_loss_prefers_the_diagonal():
    frames, characters = 40, 20
    diagonal = planted_walk(frames, characters)
    lens = torch.tensor([characters]), torch.tensor([frames])
    progress = torch.arange(frames)[None] / frames
    losses = [
        float(training.guide_loss(m.log(), progress, *lens))
        for m in (diagonal, diagonal.flip(1), diagonal.mean(1, True).expand_as(diagonal))
    ]
    assert losses[0] == min(losses)
    assert losses[1] == max(losses)


def planted_walk(frames: int, characters: int, share: float = 0.9) -> torch.Tensor:
    """An attention map [1, T, S] that puts `share` on the diagonal and spreads the rest."""
    attention = torch.full((1, frames, characters), (1 - share) / characters)
    walk = torch.arange(frames) * characters // frames
    attention[0, torch.arange(frames), walk] += share
    return attention


def test_walk_mass_finds_a_planted_diagonal_head():
    frames, characters = 50, 30
    uniform = torch.full((1, frames, characters), 1 / characters)
    backwards = planted_walk(frames, characters).flip(1)
    lens = torch.tensor([characters]), torch.tensor([frames])
    maps = {(0, 0): uniform, (0, 1): planted_walk(frames, characters), (1, 0): backwards}
    masses = {head: float(walk_mass(attention.log(), *lens)) for head, attention in maps.items()}
    assert best_heads(masses, 1) == [(0, 1)]
    assert masses[0, 1] == pytest.approx(0.9, abs=0.01)
    assert masses[1, 0] < 0.2


def test_walk_mass_ignores_padding():
    attention = planted_walk(30, 20).log()
    padded = torch.nn.functional.pad(attention, (0, 7, 0, 9), value=training.MASKED)
    lens = torch.tensor([20]), torch.tensor([30])
    assert float(walk_mass(padded, *lens)) == pytest.approx(float(walk_mass(attention, *lens)))


def test_every_head_is_measured(model):
    masses = measure_heads(model, made_up_examples(), np.arange(4))
    assert len(masses) == len(model.tfmr.layers) * model.cfg.num_attention_heads
    assert all(0 <= mass <= 1 for mass in masses.values())


def test_generation_leaves_the_model_as_it_was(model, monkeypatch):
    monkeypatch.setattr(align, "MAX_TOKENS", 12)  # an untrained model does not stop by itself
    batch = made_up_examples().batch(np.array([0]), np.random.default_rng(0))
    with quiet(), analyzer_reads([(2, 0), (3, 0), (4, 0)]):
        first = generate(model, batch, seed=1, analyzer=True)
        again = generate(model, batch, seed=1, analyzer=True)
    assert torch.equal(first, again)
    assert not model.hp.is_multilingual
    assert not any(layer.self_attn._forward_hooks for layer in model.tfmr.layers)


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 64, 24)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_phones_ahead_follow_the_labels():
    corpus = made_up_corpus([np.array([5, 6, 7, 8]), np.array([9, 3])])
    phones, progress = training.phones_ahead(corpus, np.array([8, 4]))
    assert phones[:3].tolist() == [[5, 6, 7], [5, 6, 7], [6, 7, 8]]
    assert phones[7].tolist() == [8, 0, 0]  # after the last phone comes silence, not the next utterance
    assert progress[[0, 4, 7, 8, 11]].tolist() == [0, 0.5, 0.75, 0, 0.5]
