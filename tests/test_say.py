"""`python -m harness say`: a text becomes a file, and a mistake becomes a line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT

from harness.__main__ import main

TEXT = "Yes, it does."


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text("optimizations:\n  inference_mode: {enabled: true}\n")

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        code = main(["say", "--device", "cpu", "--combo", "small.yaml", *arguments])
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


def test_a_text_becomes_a_file_in_the_voice_asked_for(say):
    code, out, _ = say(TEXT, "--voice", "slt", "-o", "yes.wav")
    assert code == 0
    assert out.startswith("yes.wav: small, slt: ")
    wave, rate = soundfile.read("yes.wav")
    assert rate == 24_000
    assert abs(wave).max() > 0.01
    say(TEXT, "--voice", "rms", "-o", "other.wav")
    assert len(soundfile.read("other.wav")[0]) != len(wave)


@pytest.mark.slow
def test_standard_input_is_compared_in_a_clips_voice(say):
    clip = ROOT / "harness/mini/weights/voices/awb.flac"
    code, out, _ = say("--compare", "--voice", str(clip), stdin="Yes,\nit does.\n")
    assert code == 0
    baseline, small, ratio = out.splitlines()
    assert baseline.startswith("out-baseline.wav: baseline, ")
    assert small.startswith("out.wav: small, ")
    assert ratio.startswith("small takes ")
    before, after = (soundfile.read(name)[0] for name in ("out-baseline.wav", "out.wav"))
    assert (before == after).all()  # inference mode changes no bit


def test_a_stream_is_written_piece_by_piece(say):
    Path("pieces.yaml").write_text(
        "optimizations: {flow_steps: {enabled: true, steps: 1}, streaming: {enabled: true, first: 5}}\n"
    )
    code, out, err = say(TEXT, "--stream", "--combo", "pieces.yaml")
    assert (code, out) == (0, "")
    pieces = [line for line in err.splitlines() if line.startswith("after ")]
    assert len(pieces) > 1
    assert pieces[0].endswith(": 0.20 s of audio")
    assert len(soundfile.read("out.wav")[0]) == pytest.approx(
        24_000 * sum(float(line.split()[3]) for line in pieces), abs=240 * len(pieces)
    )


def test_a_pipe_gets_a_wav_that_goes_on(tmp_path, monkeypatch, capsysbinary):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("optimizations: {flow_steps: {steps: 1, enabled: true}}\n")
    assert main(["say", "--device", "cpu", "--combo", "small.yaml", "--stream", "-o", "-", "Yes."]) == 0
    wave, rate = soundfile.read(io.BytesIO(capsysbinary.readouterr().out))
    assert rate == 24_000
    assert abs(wave).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["..."], "the text has no word in it"),
        ([], "the text has no word in it"),
        ([TEXT, "-o", "out.txt"], "--out out.txt: name a file that ends in .wav, .flac, .ogg, .mp3"),
        ([TEXT, "-o", "nowhere/out.wav"], "there is no folder nowhere"),
        ([TEXT, "-o", "-"], "--out -: name a file"),
        ([TEXT, "--stream", "--compare"], "leave out --stream, or --compare"),
        ([TEXT, "-o", "."], "--out .: name a file that ends in"),
        ([TEXT, "--combo", "productoin"], "did you mean production?"),
        ([TEXT, "--pipeline", "gigantic"], "unknown pipeline 'gigantic'"),
        ([TEXT, "--language", "fr"], "--language=fr: the pipeline mini speaks English only"),
        (
            [TEXT, "--pipeline", "mini_multilingual", "--language", "xx"],
            "--language=xx: the pipeline mini_multilingual",
        ),
        ([TEXT, "--device", "tpu"], "device=tpu: there is auto, cpu, cuda and cuda:N"),
        ([TEXT, "--voice", "bob"], "--voice bob: neither one of this pipeline's voices (kal16, awb, rms, slt)"),
        (["word " * 400], "the text is too long, 2"),
    ],
)
def test_a_mistake_is_one_line(say, arguments, says):
    code, out, err = say(*arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert says in line
