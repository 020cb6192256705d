"""The front door: what a command may say, what is refused before anything loads, and in which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import fields, is_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_type_hints

import numpy as np
import pytest
import soundfile
import yaml
from conftest import ROOT
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_cli import composed

from harness import clips, declared, devices, hub, preflight
from harness.clips import check_clip
from harness.config import expand, own_name
from harness.console import PlainLines
from harness.errors import UserError
from harness.results import RunFolder
from harness.settings import GROUPS, check
from harness.workload import Item, fit_voices, load_workload

# -- names and types are Hydra's to check, ranges ours ---------------------------------------------------------------

REFUSED_BY_HYDRA = [
    "measure.min_rounds=many",
    "measure.min_rounds=2.5",
    "measure.min_rounds=null",
    "measure.min_round=3",
    "measure.thresholds.rtf=tiny",
    "measure.thresholds.wear=0.1",
    "workload.seeds=7",
    "workload.voices=null",
    "pipeline.threads=some",
    "quality.asr=[whisper]",
    "gate.limits=null",
]


@pytest.mark.parametrize("override", REFUSED_BY_HYDRA)
def test_a_wrong_name_or_type_does_not_compose(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed("+combo=production", override)


OUT_OF_RANGE = [
    *("measure.min_rounds=0", "measure.max_rounds=3", "measure.budget_s=-5", "measure.budget_s=nan"),
    "measure.detectable=0",
    *("measure.budget_s=inf", "measure.processes=0", "measure.warmup_calls=-1", "measure.pinned_tokens=0"),
    *("measure.pinned_tokens=1001", "measure.tokens_per_character=0", "measure.load_limit_s=0"),
    *("measure.call_limit_s=-1", "measure.offline_baseline_items=0", "pipeline.threads=0", "pipeline.seed=-1"),
    *(f"measure.thresholds.{name}={value}" for name in ("rtf", "wer") for value in ("nan", "inf", "0", "-0.1")),
    *("+measure.rounds=3", "+workload.foo=1", "+gate.limit=3"),
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_setting_out_of_its_range_is_one_line_that_names_it(override):
    with pytest.raises(UserError) as error:
        expand(composed("+combo=production", override))
    assert override.lstrip("+").split("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["measure.budget_s=0", "measure.pinned_tokens=1000", "measure.warmup_calls=0"])
def test_the_ends_of_a_range_are_in_it(override):
    expand(composed("+combo=production", override))


@pytest.mark.parametrize("group", GROUPS)
def test_the_default_of_a_group_says_every_setting_and_nothing_else(group):
    """So that what a setting is for can be read beside it."""
    default = {"pipeline": "mini", "workload": "offline"}.get(group, "default")
    said = yaml.safe_load((ROOT / f"configs/{group}/{default}.yaml").read_text())
    assert set(said) == {field.name for field in fields(GROUPS[group])}


@pytest.mark.parametrize("schema", GROUPS.values())
def test_every_number_has_a_range(schema):
    """A number that nobody bounds is one that somebody sets to -5."""
    for one in [field.type for field in fields(schema)]:
        assert not is_dataclass(one)
    numbers = [field for field in fields(schema) if str(field.type).split(" ")[0] in ("int", "float")]
    assert all("range" in field.metadata for field in numbers)


def test_what_does_not_count_cannot_be_detected():
    expand(composed("+combo=production", "measure.detectable=0.02", "measure.thresholds.rtf=0.01"))
    with pytest.raises(UserError, match=r"measure\.detectable=0\.03: no change up to measure\.thresholds\.rtf=0\.03"):
        expand(composed("+combo=production", "measure.detectable=0.03"))


def test_a_check_needs_no_hydra():
    settings = OmegaConf.to_container(composed("+combo=production"))
    settings["measure"]["budget_s"] = float("nan")
    with pytest.raises(UserError, match=r"measure\.budget_s=nan: give a number of 0 or more"):
        check(settings)


# -- combos and their names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["combo=production", "+combo=production", "++combo=production"])
def test_both_spellings_of_a_combo_do(spelling):
    (spec,) = expand(composed(spelling))
    assert spec.combo == "production"
    assert len(expand(composed(spelling, "sweep=leave_one_out"))) == len(
        expand(composed(spelling, "+sweep=leave_one_out"))
    )


def test_a_baseline_with_something_on_has_a_name_of_its_own():
    (spec,) = expand(composed("+combo=baseline", "optimizations.kv_cache.enabled=true"))
    assert (spec.combo, spec.against) == ("baseline+kv_cache", "baseline")
    assert list(spec.toggles) == ["kv_cache"]


def test_a_combo_can_be_compared_with_another_one_as_its_file_has_it():
    (spec,) = expand(composed("+combo=min_vram", "against=production", "optimizations.kv_cache.bucket=32"))
    (production,) = expand(composed("+combo=production"))
    assert (spec.combo, spec.against) == ("min_vram", "production")
    assert spec.against_toggles == production.toggles
    assert spec.toggles["kv_cache"]["bucket"] == 32
    assert spec.config["against"] == "production"
    assert spec.config["against_optimizations"] == production.toggles


@pytest.mark.parametrize("unmodified", [[], ["against=null"], ["against=baseline"]])
def test_without_a_word_it_is_compared_with_the_unmodified_pipeline(unmodified):
    (spec,) = expand(composed("+combo=production", *unmodified))
    assert (spec.against, spec.against_toggles) == ("baseline", {})


def test_an_unknown_reference_is_named_with_the_nearest_combo():
    with pytest.raises(UserError, match=r"against=produktion.*did you mean production"):
        expand(composed("+combo=baseline", "against=produktion"))


KV, WARM = {"kv_cache": {"bucket": 256}}, {"warmup": {"levels": 2}}
NAMES = [
    (("mine", KV, "baseline", {}), "mine"),
    (("baseline", {}, "baseline", {}), "baseline_again"),
    (("baseline", KV, "baseline", {}), "baseline+kv_cache"),
    (("Baseline", KV, "baseline", {}), "Baseline+kv_cache"),  # one folder on some file systems
    (("baseline.", KV, "baseline", {}), "baseline.+kv_cache"),  # one folder on all: the dot is dropped
    (("baseline", {}, "production", KV), "unmodified"),
    (("baseline", KV, "production", KV), "production_again"),
    (("production", KV, "production", KV), "production_again"),
    (("production", KV | WARM, "production", KV), "production+warmup"),
    (("production", KV, "production", KV | WARM), "production-without-warmup"),
    (("production", {"kv_cache": {"bucket": 8}}, "production", KV), "production_changed"),
    (("baseline", {name: {} for name in "abcd"}, "baseline", {}), "baseline+4_optimizations"),
]


@pytest.mark.parametrize(("arguments", "name"), NAMES)
def test_no_two_variants_share_a_name(arguments, name):
    assert own_name(*arguments) == name


# -- the catalogue is read without being imported --------------------------------------------------------------------


def test_what_is_read_from_the_files_is_what_the_classes_declare():
    import optimizations

    read = declared.read()
    assert list(read) == list(optimizations.names())[: len(read)]
    for name, one in read.items():
        imported = declared.declaration(optimizations.CATALOGUE[name])
        assert (one.name, one.replaces, one.requires) == (imported.name, imported.replaces, imported.requires)
        assert one.defaults == imported.defaults
        assert get_type_hints(one.parameters) == get_type_hints(imported.parameters)


PARAMETERS = [
    ("kv_cache.bucket=wide", "optimizations.kv_cache.bucket=wide: give a whole number"),
    ("kv_cache.bucket=2.5", "give a whole number"),
    ("kv_cache.bucket=true", "give a whole number"),
    ("kv_cache.bucket=null", "give a whole number"),
    ("kv_cache.prefix_reuse=1", "give true or false"),
    ("warmup.shapes=[8,long]", "give a list of whole numbers"),
    ("kv_cache.bucket=0", "optimizations.kv_cache.bucket=0: give a number of 1 or more"),
    ("warmup.shapes=[8,0]", "optimizations.warmup.shapes=[8,0]: give a list of numbers from 1 to 1000"),
    ("warmup.shapes=[]", "give a list of numbers from 1 to 1000"),
    ("mixed_precision.dtype=float17", "optimizations.mixed_precision.dtype=float17: choose one of auto, bfloat16"),
    ("mixed_precision.parts=[t3,ears]", "give auto, or a list of one or more of t3, flow"),
    ("quantization.parts=[]", "optimizations.quantization.parts=[]: give a list of one or more of t3, flow"),
    ("compile.decode=fortran", "choose one of auto, triton"),
    ("kv_cache.enabled=yes_please", "give true or false"),
]


@pytest.mark.parametrize(("override", "words"), PARAMETERS)
def test_a_parameter_of_another_type_is_refused(override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        expand(composed("+combo=production", f"optimizations.{override}"))


def test_of_what_is_read_every_limit_is_the_classes_own():
    import optimizations

    for name, one in declared.read().items():
        classes = optimizations.CATALOGUE[name].Config
        assert [field.metadata for field in fields(one.parameters)] == [field.metadata for field in fields(classes)]


def test_a_module_constant_may_be_a_default_and_code_may_not(tmp_path):
    source = (
        "A = 3\n@register\nclass X(Optimization):\n    name = 'x'\n    @dataclass\n    class Config:\n        a: int = "
    )
    for default, readable in (("A", True), ("7", True), ("field(default_factory=lambda: 4)", True), ("f(A)", False)):
        (tmp_path / "x.py").write_text(f"{source}{default}\n")
        if readable:
            assert declared._read_file(tmp_path / "x.py").name == "x"
        else:
            with pytest.raises(declared.UnreadableError):
                declared._read_file(tmp_path / "x.py")


# -- reference clips -------------------------------------------------------------------------------------------------

RATE = 16_000


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    time_s = np.arange(int(seconds * rate)) / rate
    return (0.1 * np.sin(2 * np.pi * 200 * time_s)).astype(np.float32)


def wav(path, wave, rate=RATE, **how):
    soundfile.write(path, wave, rate, **{"subtype": "FLOAT"} | how)
    return path


def cut(path, wave):
    soundfile.write(path, wave, RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def written(path, content: bytes):
    path.write_bytes(content)
    return path


def nan(wave):
    wave[len(wave) // 2] = np.nan
    return wave


CLIPS = {
    "absent": (lambda to: to / "me.wav", "there is no such file"),
    "a folder": (lambda to: to, "a folder"),
    "text": (lambda to: written(to / "me.wav", b"Dear diary, ..."), "cannot be read as audio"),
    "text by name": (lambda to: written(to / "me.txt", b"Dear diary, ..."), "cannot be read as audio"),
    "no bytes": (lambda to: written(to / "me.wav", b""), "cannot be read as audio"),
    "raw samples": (lambda to: written(to / "me.raw", bytes(4000)), "raw samples"),
    "no samples": (lambda to: wav(to / "me.wav", tone(0)), "empty"),
    "NaN": (lambda to: wav(to / "me.wav", nan(tone(3))), "not finite"),
    "NaN after a minute": (lambda to: wav(to / "me.wav", np.concatenate([tone(60), nan(tone(60))])), "not finite"),
    "silence": (lambda to: wav(to / "me.wav", 0 * tone(3)), "0.0 s of sound"),
    "nearly silence": (lambda to: wav(to / "me.wav", 1e-3 * tone(3)), "0.0 s of sound"),
    "a constant": (lambda to: wav(to / "me.wav", 0 * tone(3) + 0.5), "0.0 s of sound"),
    "sides that cancel out": (lambda to: wav(to / "me.wav", np.stack([tone(3), -tone(3)], axis=1)), "0.0 s of sound"),
    "too short": (lambda to: wav(to / "me.wav", tone(0.2)), "0.2 s of sound"),
    "a click": (lambda to: wav(to / "me.wav", np.r_[0 * tone(2), tone(0.1), 0 * tone(2)]), "0.1 s of sound"),
    "speech that comes late": (lambda to: wav(to / "me.wav", np.r_[0 * tone(7), tone(7)]), "its first 6 s hold 0.0 s"),
    "one sample a second": (lambda to: wav(to / "me.wav", tone(5, 100), 1), "1 samples a second"),
    "another scale": (lambda to: wav(to / "me.wav", 1e5 * tone(3)), "full scale is 1"),
    "a cut FLAC": (lambda to: cut(to / "me.flac", tone(5)), "me.flac"),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_a_clip_that_teaches_no_voice_is_refused_in_a_line_that_names_it(tmp_path, kind):
    make, reason = CLIPS[kind]
    clip = make(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        check_clip(str(clip))
    assert str(clip) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_clip_that_may_not_be_read_is_refused(tmp_path):
    clip = wav(tmp_path / "me.wav", tone(3))
    clip.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        check_clip(str(clip))


@pytest.mark.parametrize("name", ["me.wav", "me.flac", "me.ogg", "me.mp3"])
def test_a_good_clip_passes_without_a_word(tmp_path, name):
    soundfile.write(tmp_path / name, np.stack([tone(5), tone(5)], axis=1), RATE)
    assert check_clip(str(tmp_path / name)) is None


def test_of_a_long_clip_it_says_what_is_used(tmp_path):
    clip = wav(tmp_path / "me.wav", tone(300), subtype="PCM_16")
    warning = check_clip(str(clip))
    assert "300 s" in warning
    assert "the first 10 s and T3 the first 6 s" in warning
    group = yaml.safe_load((ROOT / "configs/workload/smoke.yaml").read_text()) | {"voices": [str(clip)]}
    assert load_workload(group).warnings == (warning,)


def test_what_upstream_reads_of_a_clip():
    from chatterbox.tts import ChatterboxTTS

    assert ChatterboxTTS.ENC_COND_LEN == clips.T3_READS_S * 16_000
    assert ChatterboxTTS.DEC_COND_LEN == clips.FLOW_READS_S * 24_000


def test_a_built_in_voice_is_meant_even_where_a_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rms").write_text("a file by chance")
    (tmp_path / "me").write_text("another one")
    items = [Item("t", "Hello.", "rms")]
    assert fit_voices(items, ["kal16", "rms"]) == (items, [])
    assert not clips.is_clip("rms")
    assert clips.is_clip("./rms")
    with pytest.raises(UserError, match=r"to mean the file write \./me"):
        fit_voices([Item("t", "Hello.", "me")], ["kal16", "rms"])


def test_two_clips_of_one_name_do_not_overwrite_each_other(tmp_path):
    voices = ["rms", "rms.wav", "a/rms.wav", "b/rms.wav", "b/rms.flac"]
    assert len({RunFolder(tmp_path).clip("baseline", "t1", voice, 1) for voice in voices}) == len(voices)


# -- devices, models, folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "tpu", "cuda:x", "cpu:", "CPU", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    if device == "cpu:":
        return
    with pytest.raises(UserError, match=f"device={device}"):
        preflight.check_device(device)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("0", 1), ("", 0), ("-1", 0), ("2,3", 2), ("0,-1,1", 1), ("GPU-abc,GPU-def", 2)]
)
def test_devices_that_are_hidden_do_not_count(monkeypatch, visible, count):
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.count_gpus() == count


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    preflight.check_folder("results_dir", str(tmp_path / "new" / "deeper"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"results_dir=.*is a file"):
            preflight.check_folder("results_dir", str(folder))


class Hub(BaseHTTPRequestHandler):
    """Has one file, and for another never answers."""

    def do_HEAD(self):
        if "hang" in self.path:
            time.sleep(3)
        self.send_response(200 if self.path.startswith("/known/model/") else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", '"b"')
        self.send_header("Content-Length", "1")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        value = address if name == "ENDPOINT" else address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_S", 1.0)
    yield server
    server.shutdown()
    server.server_close()


FILES = (("config.json",), ("model.safetensors", "pytorch_model.bin"))


def test_the_hub_is_asked_for_one_file(hub_server):
    assert hub.why_not("known/model", FILES) is None
    assert "404" in hub.why_not("unknown/model", FILES)


def test_a_hub_that_hangs_or_is_gone_is_told_within_seconds(hub_server):
    start = time.monotonic()
    assert hub.why_not("hang/model", FILES)
    hub_server.shutdown()
    hub_server.server_close()
    assert hub.why_not("known/model", FILES)
    assert time.monotonic() - start < 20


def test_a_complete_copy_in_the_cache_serves_and_half_of_one_does_not(hub_server, tmp_path):
    hub_server.shutdown()
    hub_server.server_close()
    repository = tmp_path / "cache" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").touch()
    assert hub.why_not("some/model", FILES)
    (snapshot / "pytorch_model.bin").touch()
    assert hub.why_not("some/model", FILES) is None
    assert hub.cached_folder("some/model", FILES) == snapshot


def test_a_local_folder_needs_its_files_and_no_hub(tmp_path):
    assert "lacks config.json" in hub.why_not(str(tmp_path), FILES)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert hub.why_not(str(tmp_path), FILES) is None


# -- plain lines -----------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_line_comes_with_each_phase_and_every_15_seconds(capsys):
    now = [0.0]
    show = PlainLines(lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        if second < 10:
            show("loading baseline", 0, 0)
        else:
            show(f"speed pass, {'production' if second % 2 else 'baseline'}", second - 10, 180)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading baseline"
    assert lines[1] == "speed pass, baseline: 0 of 180"
    assert lines[2] == "speed pass, production: 15 of 180, about 3 min left"
    assert len(lines) == 7


# -- quick answers ---------------------------------------------------------------------------------------------------

QUICK = {
    "+combo=production pipeline=chatterbox": "ResembleAI/chatterbox cannot be fetched (",
    "+combo=production quality.asr=whisper": "openai/whisper-large-v3 cannot be loaded (",
    "+combo=productoin": "did you mean production?",
    "+combo=production optimizations.kv_cach.enabled=true": "did you mean kv_cache?",
    "+combo=production optimizations.kv_cache.buket=3": "did you mean bucket?",
    "+combo=production workload.seeds=[]": "workload.seeds=[]",
    "+combo=production device=cuda:99": "device=cuda:99",
    "+combo=production measure.min_rounds=0": "measure.min_rounds=0",
    "+combo=production workload.voices=[README.md]": "reference clip README.md",
    "+combo=production workload.voices=[nobody]": "neither built in",
    "+combo=production pipeline.loader=harness.checkpoints.lod": "harness.checkpoints.lod",
    "+combo=production pipeline.name=minni": "did you mean mini?",
    "+combo=production optimizations.mixed_precision.dtype=float17": "choose one of auto",
    "+combo=production gate.limits=[fast]": "gate limit 'fast'",
    "+combo=production pipeline.sampling.cfg_weight=nan": "pipeline.sampling.cfg_weight=nan: give a number from 0",
    "+combo=production pipeline.language=fr": "speaks English only",
    "+combo=production pipeline=mini_multilingual pipeline.language=xx": "pipeline.language=xx",
    "+combo=production workload=languages": "workload, text de1: language=de",
    "plugin_modules=[fakes] optimizations.fake_fast.enabled=true workload.seeds=[]": "workload.seeds=[]",
}
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there


ARGUMENTS = list(QUICK)
OTHERS = [pytest.param(arguments, marks=pytest.mark.slow) for arguments in ARGUMENTS[5:]]


@pytest.mark.parametrize("arguments", [*ARGUMENTS[:5], *OTHERS])
def test_a_bad_command_is_answered_before_anything_heavy_is_imported(arguments, tmp_path):
    """Whether PyTorch came in is what is tested, and the time of the CPU: on a busy machine the clock says little."""
    script = (
        "import run_sweep, sys; code = run_sweep.main(); print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    before_s = _childrens_cpu_s()
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split(), f"results_dir={tmp_path / 'results'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HOME": str(tmp_path / "hub")}
        | NO_HUB,
        timeout=60,
    )
    words, heavy = done.stderr.splitlines()
    assert QUICK[arguments] in words
    assert (done.returncode, heavy) == (2, "False")
    assert _childrens_cpu_s() - before_s < 4
    assert not (tmp_path / "results").exists()


def _childrens_cpu_s() -> float:
    """Of children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


# -- where it runs -----------------------------------------------------------------------------------------------

ON_WINDOWS = (
    "import runpy, sys; sys.platform = 'win32'; sys.modules['fcntl'] = sys.modules['resource'] = None; "
    "sys.argv = ['a command']; "
)


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_path('run_sweep.py', run_name='__main__')",
        "runpy.run_module('harness', run_name='__main__')",
        "from harness.say import main; main()",
    ],
)
def test_on_windows_a_command_says_in_a_line_where_it_runs(start):
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS + start], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: this harness runs on Linux; on Windows run it inside WSL.*\n", done.stderr)


def test_on_windows_an_application_is_told_so_by_the_import():
    caught = "try:\n import chatterbox_harness\nexcept ImportError as error:\n print(error)"
    done = subprocess.run(
        [sys.executable, "-c", f"{ON_WINDOWS}\n{caught}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "run the application inside WSL" in done.stdout
