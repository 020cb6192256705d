"""Chatterbox Turbo as a pipeline: upstream's `ChatterboxTurboTTS`, stage by stage; and Nano, a smaller Turbo.

What differs from the English model: a GPT-2 in place of the Llama, one row as there is no guidance, a voice that opens
with 375 of its own speech tokens, GPT-2's text tokens, three tokens of silence behind the speech, and a flow that was
distilled to two steps without guidance.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3gen.const import S3GEN_SIL
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts_turbo import ChatterboxTurboTTS, Conditionals, punc_norm
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness import hub
from harness.errors import UserError
from harness.mini import models as mini
from harness.pipeline import Pipeline, Segment, random_numbers_kept, speech, stop_held_back, taught

UPSTREAM_GPT2 = "GPT2_medium"
NANO_GPT2 = "GPT2_small"
LLAMA_CONFIGS.setdefault(
    NANO_GPT2, LLAMA_CONFIGS[UPSTREAM_GPT2] | {"hidden_size": 768, "n_embd": 768, "n_head": 12, "n_layer": 12}
)
TINY_GPT2 = "GPT2_tiny"
LLAMA_CONFIGS[TINY_GPT2] = LLAMA_CONFIGS[UPSTREAM_GPT2] | {
    "hidden_size": 128,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 4,
    "n_positions": 2048,
    "n_ctx": 2048,
    "vocab_size": 8,
}
N_TEXT_TOKENS = 50276


class Nano(ChatterboxTurboTTS):
    """Nano, of which `chatterbox-tts` 0.1.7 knows nothing: Turbo's parts around a smaller GPT-2, whose file has a name
    of its own."""

    @classmethod
    def from_local(cls, ckpt_dir: str | Path, device: str) -> Nano:
        folder = Path(ckpt_dir)

        def weights(name: str) -> dict[str, Tensor]:
            return load_file(folder / f"{name}.safetensors")

        voice_encoder, s3gen, t3 = VoiceEncoder(), S3Gen(meanflow=True), T3(TurboT3Config(NANO_GPT2))
        voice_encoder.load_state_dict(weights("ve"))
        s3gen.load_state_dict(weights("s3gen_meanflow"))
        t3.load_state_dict(weights("t3_nano_v1"))
        del t3.tfmr.wte
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        conds = Conditionals.load(folder / "conds.pt", map_location="cpu").to(device)
        t3, s3gen, voice_encoder = (part.to(device).eval() for part in (t3, s3gen, voice_encoder))
        return cls(t3, s3gen, voice_encoder, tokenizer, device, conds=conds)

    @classmethod
    def from_pretrained(cls, device: str) -> Nano:
        return cls.from_local(snapshot_download(hub.REPOSITORIES["nano"]), device)


class TurboPipeline(Pipeline):
    """Upstream's Turbo behind the stages of `Pipeline`."""

    model: ChatterboxTurboTTS
    n_starts = 1
    start_stays_seen = False
    silence = (S3GEN_SIL,) * 3

    def _condition(self, voice: str) -> Conditionals:
        """A built-in voice by its name, or a reference clip by its path, as `generate` prepares them."""
        if voice in self.voices:
            self.model.conds = self.voices[voice]
            return self.model.conds
        try:
            self.model.prepare_conditionals(voice, exaggeration=self.sampling.exaggeration)
        except AssertionError as error:  # upstream's word for a clip of less than five seconds
            raise UserError(f"the reference clip {voice}: {error}") from error
        return self.model.conds

    def _generate_one(self, segment: Segment) -> Tensor:
        s, t3 = self.sampling, self.model.t3
        with ExitStack() as contexts:
            if s.greedy:  # in words of upstream's loop, for which temperature 0 is temperature 1
                s = replace(s, temperature=1.0, top_k=1, top_p=1.0)
                contexts.enter_context(random_numbers_kept(self.device))
            if segment.n_tokens:
                contexts.enter_context(stop_held_back(t3))
            if segment.teacher:
                contexts.enter_context(taught(t3, segment.teacher, cfg_weight=0.0))
            tokens = t3.inference_turbo(
                t3_cond=segment.conditionals.t3,
                text_tokens=self.text_tokens(segment.text),
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                repetition_penalty=s.repetition_penalty,
                max_gen_len=(segment.n_tokens or s.max_new_tokens) - 1,  # beside the first one
            )
        return self.speech_only(tokens[0]).to(self.device)

    def speech_only(self, tokens: Tensor) -> Tensor:
        """What upstream gives this model's flow of sampled ids [n]: all that are speech, wherever a start token is."""
        return speech(tokens)

    def text_tokens(self, text: str, language: str | None = None, wait: bool = True) -> Tensor:
        """Text token ids [1, n]."""
        tokens = self.model.tokenizer(punc_norm(text), return_tensors="pt", padding=True, truncation=True)
        return tokens.input_ids.to(self.device, non_blocking=not wait)


class TurboT3Config(T3Config):
    """T3's hyperparameters as `ChatterboxTurboTTS.from_local` sets them."""

    def __init__(self, backbone: str = UPSTREAM_GPT2, n_text_tokens: int = N_TEXT_TOKENS) -> None:
        super().__init__(text_tokens_dict_size=n_text_tokens)
        self.llama_config_name = backbone
        self.speech_tokens_dict_size = 6563
        self.input_pos_emb = None
        self.speech_cond_prompt_len = 375
        self.use_perceiver_resampler = False
        self.emotion_adv = False


def build_t3(hp: T3Config) -> T3:
    """T3 as `from_local` leaves it, which drops the table of words that nobody looks up."""
    t3 = T3(hp)
    del t3.tfmr.wte
    return t3


def build(
    device: torch.device, backbone: str = UPSTREAM_GPT2
) -> tuple[T3, S3Gen | mini.MiniS3Gen, VoiceEncoder, PreTrainedTokenizerFast]:
    """Turbo's parts with weights drawn from PyTorch's random numbers: with upstream's GPT-2, Nano's, or all tiny."""
    if backbone == TINY_GPT2:
        hp = TurboT3Config(TINY_GPT2, n_text_tokens=256)
        parts = build_t3(hp), mini.MiniS3Gen(meanflow=True), mini.build_voice_encoder()
    else:
        parts = build_t3(TurboT3Config(backbone)), S3Gen(meanflow=True), VoiceEncoder()
    t3, s3gen, voice_encoder = (part.to(device).eval() for part in parts)
    return t3, s3gen, voice_encoder, byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for GPT-2's tokenizer: its 256 bytes, none of its words. A text has some four times as many tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=alphabet[0], eos_token=alphabet[0])
