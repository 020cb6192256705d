"""Where a pipeline's weights come from.

mini, mini_multilingual        the miniature checkpoint of this repository; the second has upstream's analyzer on
chatterbox, multilingual       Resemble AI's checkpoints: from the hub, or from `checkpoint_dir`
turbo, nano                    Resemble AI's Turbo and its small sister, likewise
random, random_multilingual    upstream's full-size modules with seeded random weights: right for speed and
random_turbo, random_nano      memory, meaningless for quality
tiny_turbo                     Turbo's modules in tiny, with seeded random weights: for tests
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.mtl_tts import ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS, Conditionals
from chatterbox.tts_turbo import ChatterboxTurboTTS
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from harness import hub, turbo
from harness.errors import UserError
from harness.mini import models as mini
from harness.pipeline import Pipeline
from harness.sampling import DEFAULTS

RANDOM_PROMPT_S = 10
"""Length of the random voices' prompt: the longest that upstream uses, hence the dearest flow."""
TINY_PROMPT_S = 2


def load(name: str, device: str | torch.device, checkpoint_dir: str | Path | None = None, seed: int = 0) -> Pipeline:
    """The named checkpoint as a baseline pipeline on `device`.

    `seed` draws the weights of the random checkpoints. Raises UserError for an unknown name, a missing file, an
    unreachable hub, or a CUDA device that is not there.
    """
    if name not in LOADERS:
        raise UserError(f"unknown pipeline {name!r}: choose one of {', '.join(LOADERS)}")
    return LOADERS[name](_device(device), checkpoint_dir, seed)


def _device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no CUDA device: use device=cpu, or check `nvidia-smi`")
    return device


def _mini(device: torch.device, multilingual: bool) -> Pipeline:
    model, voices, trained = mini.load(device, multilingual=multilingual)
    name = "mini_multilingual" if multilingual else "mini"
    return Pipeline(model, device, voices, name=name, trained=trained)


UPSTREAM = {
    "chatterbox": (ChatterboxTTS, Pipeline),
    "multilingual": (ChatterboxMultilingualTTS, Pipeline),
    "turbo": (ChatterboxTurboTTS, turbo.TurboPipeline),
    "nano": (turbo.Nano, turbo.TurboPipeline),
}
"""Resemble AI's models: upstream's class, and ours."""


def _upstream(name: str, device: torch.device, folder: str | Path | None) -> Pipeline:
    cls, pipeline = UPSTREAM[name]
    hub.check_checkpoint(name, folder)
    if local := folder or hub.cached_checkpoint(name):
        model = cls.from_local(Path(local), str(device))
    else:
        try:
            model = cls.from_pretrained(str(device))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise hub.cannot_fetch(name, reason) from error
    return pipeline(model, device, {"default": model.conds}, name=name, sampling=DEFAULTS[name])


def _random(device: torch.device, multilingual: bool, seed: int) -> Pipeline:
    """Upstream's full-size modules as a seed initializes them, with the miniature's character tokenizer.

    They are drawn on `device`, which takes a GPU a second and a CPU half a minute; the same seed gives other weights
    on another kind of device.
    """
    with torch.random.fork_rng(), device:
        torch.manual_seed(seed)
        t3 = T3(T3Config.multilingual() if multilingual else T3Config.english_only()).to(device).eval()
        s3gen = S3Gen().to(device).eval()
        voice_encoder = VoiceEncoder().to(device).eval()
        voices = {"random": _random_voice(t3.hp).to(device)}
    cls = ChatterboxMultilingualTTS if multilingual else ChatterboxTTS
    tokenizer = mini.build_tokenizer(multilingual=multilingual)
    model = cls(t3, s3gen, voice_encoder, tokenizer, str(device), conds=voices["random"])
    name = "random_multilingual" if multilingual else "random"
    return Pipeline(model, device, voices, name=name, trained=False, sampling=DEFAULTS[name])


def _random_turbo(name: str, device: torch.device, backbone: str, seed: int) -> Pipeline:
    """Turbo's modules as a seed initializes them, with a tokenizer of bytes; see `_random`."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(seed)
        t3, s3gen, voice_encoder, tokenizer = turbo.build(device, backbone)
        prompt_s = TINY_PROMPT_S if backbone == turbo.TINY_GPT2 else RANDOM_PROMPT_S
        voices = {"random": _random_voice(t3.hp, prompt_s).to(device)}
    model = ChatterboxTurboTTS(t3, s3gen, voice_encoder, tokenizer, str(device), conds=voices["random"])
    return turbo.TurboPipeline(model, device, voices, name=name, trained=False, sampling=DEFAULTS[name])


def _random_voice(hp: T3Config, prompt_s: int = RANDOM_PROMPT_S) -> Conditionals:
    """Conditionals of a real voice's shapes; 10 s are a prompt of 250 tokens and 500 mel frames."""
    n_tokens = prompt_s * 25
    t3_cond = T3Cond(
        speaker_emb=F.normalize(torch.rand(1, hp.speaker_embed_size)),
        cond_prompt_speech_tokens=torch.randint(0, SPEECH_VOCAB_SIZE, (1, hp.speech_cond_prompt_len)),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    gen = {
        "prompt_token": torch.randint(0, SPEECH_VOCAB_SIZE, (1, n_tokens)),
        "prompt_token_len": torch.tensor([n_tokens]),
        "prompt_feat": torch.randn(1, 2 * n_tokens, 80),
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192),
    }
    return Conditionals(t3_cond, gen)


Loader = Callable[[torch.device, str | Path | None, int], Pipeline]
LOADERS: dict[str, Loader] = {
    "mini": lambda device, _folder, _seed: _mini(device, multilingual=False),
    "mini_multilingual": lambda device, _folder, _seed: _mini(device, multilingual=True),
    "chatterbox": lambda device, folder, _seed: _upstream("chatterbox", device, folder),
    "multilingual": lambda device, folder, _seed: _upstream("multilingual", device, folder),
    "turbo": lambda device, folder, _seed: _upstream("turbo", device, folder),
    "nano": lambda device, folder, _seed: _upstream("nano", device, folder),
    "random": lambda device, _folder, seed: _random(device, multilingual=False, seed=seed),
    "random_multilingual": lambda device, _folder, seed: _random(device, multilingual=True, seed=seed),
    "random_turbo": lambda device, _folder, seed: _random_turbo("random_turbo", device, turbo.UPSTREAM_GPT2, seed),
    "random_nano": lambda device, _folder, seed: _random_turbo("random_nano", device, turbo.NANO_GPT2, seed),
    "tiny_turbo": lambda device, _folder, seed: _random_turbo("tiny_turbo", device, turbo.TINY_GPT2, seed),
}
