"""Resemble AI's checkpoints, as far as can be without them: their files, their names, upstream's own reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.mtl_tts import ChatterboxMultilingualTTS
from checkpoint_files import full_size, load, with_languages, write_checkpoint
from test_sampling import measured

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Segment
from harness.sampling import ENGLISH, MULTILINGUAL

TEXT = "Nous avons le temps."


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A folder like that of Resemble AI's English model, and the pipeline that its weights come from."""
    whole = checkpoints.load("mini", "cpu")
    return write_checkpoint(tmp_path_factory.mktemp("english"), whole.model, multilingual=False), whole


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """The same of the multilingual model, whose languages have tokens."""
    whole = checkpoints.load("mini_multilingual", "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with_languages(whole.model.t3)
    return write_checkpoint(tmp_path_factory.mktemp("multilingual"), whole.model, multilingual=True)


@pytest.mark.slow
def test_what_is_read_from_the_english_files_speaks_as_what_was_written(english):
    folder, whole = english
    read = load("chatterbox", "cpu", str(folder))
    assert (read.name, read.trained, read.sampling, list(read.voices)) == ("chatterbox", True, ENGLISH, ["default"])
    expected = whole.synthesize("It rains.", next(iter(whole.voices)), 3, n_tokens=10)
    np.testing.assert_array_equal(read.synthesize("It rains.", "default", 3, n_tokens=10).wave, expected.wave)


def test_the_multilingual_files_bring_languages(multilingual):
    read = load("multilingual", "cpu", str(multilingual))
    assert isinstance(read.model, ChatterboxMultilingualTTS)
    assert (read.name, read.sampling) == ("multilingual", MULTILINGUAL)
    said = {language: read.synthesize(TEXT, "default", 3, 10, language).tokens[0] for language in ("fr", "de", None)}
    assert not torch.equal(said["fr"], said["de"]), "the token of the language is read"
    read.language = "de"
    assert torch.equal(read.synthesize(TEXT, "default", 3, 10).tokens[0], said["de"])


@pytest.mark.slow
def test_optimizations_hold_on_the_multilingual_files(multilingual):
    read = load("multilingual", "cpu", str(multilingual))
    read.sampling = replace(read.sampling, temperature=0.0)
    expected = [read.synthesize(TEXT, "default", 3, 12, language).tokens[0] for language in ("fr", "de")]
    for name in ("alignment_analyzer", "kv_cache", "batching"):
        optimizations.create(name).apply(read)
    spoken = [read.synthesize(TEXT, "default", 3, 12, language).tokens[0] for language in ("fr", "de")]
    assert all(torch.equal(one, other) for one, other in zip(expected, spoken, strict=True))


def test_upstream_head_penalizes_the_multilingual_model_less(multilingual):
    read = load("multilingual", "cpu", str(multilingual))
    optimizations.create("upstream_head").apply(read)
    assert read.sampling.repetition_penalty == 1.2


@pytest.mark.parametrize("missing", ["s3gen.pt", "grapheme_mtl_merged_expanded_v1.json"])
def test_a_folder_that_lacks_a_file_is_named_with_it(multilingual, tmp_path, missing):
    for file in multilingual.iterdir():
        if file.name != missing and file.is_file():
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match=rf"lacks {missing}"):
        load("multilingual", "cpu", str(tmp_path))


@pytest.mark.slow
def test_from_the_multilingual_files_to_a_report(multilingual, tmp_path):
    """One command, as docs/checkpoints.md has it; only the parts are small."""
    own = tmp_path / "mine.yaml"
    own.write_text("[{id: bonjour, text: 'Il fait beau.', language: fr}, {id: morgen, text: 'Guten Morgen.'}]")
    folder = measured(
        tmp_path,
        *("+combo=production", "pipeline=multilingual", "pipeline.loader=checkpoint_files.load"),
        *(f"pipeline.checkpoint_dir={multilingual}", "pipeline.language=de", f"workload.file={own}"),
        *("measure.pinned_tokens=12", "pipeline.sampling.max_new_tokens=40"),
    )
    summary = folder.summary()
    assert (summary.status, summary.pipeline) == ("ok", "multilingual (language=de, max_new_tokens=40)")
    assert {stage["verdict"] for stage in folder.read_json("fidelity.json")["stages"].values()} == {"faithful"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatterbox", "multilingual"])
def test_files_of_full_size_are_read_by_upstream_itself(tmp_path, name):
    """Nothing is lent: upstream's sizes, three gigabytes. T3 says three tokens; the flow would take minutes."""
    is_multilingual = name == "multilingual"
    model = full_size(is_multilingual)
    write_checkpoint(tmp_path / name, model, is_multilingual)
    kept = model.t3.speech_head.weight.clone()
    del model
    read = checkpoints.load(name, "cpu", tmp_path / name)
    assert torch.equal(read.model.t3.speech_head.weight, kept)
    voice = read.stages["condition"]("default")
    assert isinstance(voice.t3, T3Cond)
    language = "fr" if is_multilingual else None
    with torch.inference_mode():
        (tokens,) = read.stages["generate_tokens"]([Segment("Oui.", voice, 0, 3, language=language)])
    assert len(tokens) == 3
