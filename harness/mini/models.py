"""Chatterbox, built small: the sizes of the miniature checkpoint, and how to load it.

Every part is one of upstream's own classes with smaller numbers, so whatever works on this model
(and whatever breaks it) does the same to the full-size one. What stays as upstream has it: 25 speech tokens per
second out of FSQ's 3^8 = 6561, 80 mel bins at 50 frames per second, 24 kHz, ten flow steps with
classifier-free guidance, and the order of calls inside `ChatterboxTTS.generate`.

One freedom is used: only the first `ACTIVE_DIGITS` of the tokenizer's eight ternary digits ever move; the
others rest at their middle value. `CODES`, the codes in use, are then few enough for a small language model to learn in
minutes, and embedding tables are stored without the rows that nobody looks up. The next digit's upper value
makes a synonym of every code (`SYNONYM` above it): where a sound lasts, T3 writes a code and its synonym in turn,
because upstream's analyzer takes two equal tokens in a row for a hang-up and ends the sentence.
"""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import librosa
import torch
from chatterbox.models.s3gen.configs import CFM_PARAMS
from chatterbox.models.s3gen.decoder import ConditionalDecoder
from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
from chatterbox.models.s3gen.flow import CausalMaskedDiffWithXvec
from chatterbox.models.s3gen.flow_matching import CausalConditionalCFM
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from chatterbox.models.s3gen.s3gen import S3GEN_SR, S3Token2Wav
from chatterbox.models.s3gen.transformer.upsample_encoder import (
    PreLookaheadLayer,
    Upsample1D,
    UpsampleConformerEncoder,
)
from chatterbox.models.s3gen.utils.mel import mel_spectrogram
from chatterbox.models.s3gen.xvector import CAMPPlus
from chatterbox.models.s3tokenizer.s3tokenizer import S3_SR, SPEECH_VOCAB_SIZE, S3Tokenizer
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference import alignment_stream_analyzer
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.perceiver import Perceiver
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.tokenizers import EnTokenizer
from chatterbox.models.voice_encoder import VoiceEncConfig, VoiceEncoder
from chatterbox.mtl_tts import ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS, Conditionals
from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
VOICES = ("kal16", "awb", "rms", "slt")

ACTIVE_DIGITS = 6
_REST = sum(3**digit for digit in range(ACTIVE_DIGITS, 8))  # a resting digit reads 1
SYNONYM = 3**ACTIVE_DIGITS
CODES = range(_REST, _REST + 2 * SYNONYM)  # what the tokenizer writes, then the synonyms

START_TEXT, STOP_TEXT = 3, 0
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-()"
TEXT_TOKENS = ("[STOP]", "[UNK]", "[SPACE]", "[START]", *CHARACTERS)

UPSTREAM_LLAMA = "Llama_520M"
MINI_LLAMA = "Llama_mini"
LLAMA_CONFIGS[MINI_LLAMA] = LLAMA_CONFIGS[UPSTREAM_LLAMA] | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ANALYZER_HEADS = [(3, 0), (4, 0), (5, 0)]  # (layer, head); replaced by what the align stage measures

PACKED_TABLES = {"speech_emb.weight", "speech_head.weight", "flow.input_embedding.weight"}


class MiniT3Config(T3Config):
    """Upstream's T3 hyperparameters for an 8-layer backbone and a character vocabulary."""

    def __init__(self, multilingual: bool = False):
        super().__init__(text_tokens_dict_size=len(TEXT_TOKENS))
        self.multilingual = multilingual
        self.start_text_token, self.stop_text_token = START_TEXT, STOP_TEXT
        self.max_text_tokens = 720  # one a character; upstream's 40 s of speech take about 600
        self.speech_tokens_dict_size = SPEECH_VOCAB_SIZE + 3  # codes, start, stop, one spare row
        self.max_speech_tokens = 1010  # generate() stops at 1000
        self.llama_config_name = MINI_LLAMA
        self.speech_cond_prompt_len = 75

    @property
    def is_multilingual(self) -> bool:
        """Upstream runs its alignment analyzer when this is true."""
        return self.multilingual


class MiniS3Tokenizer(S3Tokenizer):
    """Upstream's speech tokenizer with a 3-layer encoder.

    `S3Tokenizer.__init__` drops its `config` and shares one mutable default, so its parent is set up
    directly and the two buffers of `S3Tokenizer.log_mel_spectrogram` are registered here.
    """

    def __init__(self) -> None:
        config = ModelConfig(n_audio_state=128, n_audio_head=2, n_audio_layer=3)
        S3TokenizerV2.__init__(self, "speech_tokenizer_v2_25hz", config)
        self.n_fft = 400
        filters = librosa.filters.mel(sr=S3_SR, n_fft=self.n_fft, n_mels=config.n_mels)
        self.register_buffer("_mel_filters", torch.from_numpy(filters).float())
        self.register_buffer("window", torch.hann_window(self.n_fft))
        with torch.no_grad():  # zero projection: these digits round to their middle value for any input
            self.quantizer._codebook.project_down.weight[ACTIVE_DIGITS:] = 0
            self.quantizer._codebook.project_down.bias[ACTIVE_DIGITS:] = 0


class MiniS3Gen(S3Token2Wav):
    """Upstream's tokens-to-wave model with smaller parts; every method is inherited.

    `S3Token2Wav.__init__` has its sizes hard-coded, so this one builds the same attributes itself.
    """

    def __init__(self, meanflow: bool = False) -> None:
        """`meanflow`: with a flow as Turbo has it, whose estimator also knows where its step ends."""
        nn.Module.__init__(self)
        self.tokenizer = MiniS3Tokenizer()
        self.mel_extractor = mel_spectrogram
        self.speaker_encoder = CAMPPlus(growth_rate=4, bn_size=2, init_channels=32, memory_efficient=False)
        self.meanflow = meanflow
        self.flow = _build_flow(meanflow=meanflow)
        self.resamplers: dict = {}
        self.mel2wav = HiFTGenerator(
            base_channels=128,
            sampling_rate=S3GEN_SR,
            upsample_rates=[8, 5, 3],
            upsample_kernel_sizes=[16, 11, 7],
            source_resblock_kernel_sizes=[3, 7, 11],
            source_resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
            f0_predictor=ConvRNNF0Predictor(cond_channels=64),
        )
        silence = S3GEN_SR // 50  # 20 ms of silence, then a 20 ms fade-in, as upstream
        ramp = (torch.cos(torch.linspace(torch.pi, 0, silence)) + 1) / 2
        self.register_buffer("trim_fade", torch.cat([torch.zeros(silence), ramp]), persistent=False)
        self.estimator_dtype = "fp32"


def _build_flow(dim: int = 128, meanflow: bool = False) -> CausalMaskedDiffWithXvec:
    encoder = UpsampleConformerEncoder(
        input_size=dim,
        output_size=dim,
        attention_heads=2,
        linear_units=2 * dim,
        num_blocks=2,
        normalize_before=True,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        use_cnn_module=False,
        macaron_style=False,
    )
    # Upstream writes 512 channels and four layers after upsampling into the constructor.
    encoder.pre_lookahead_layer = PreLookaheadLayer(channels=dim, pre_lookahead_len=3)
    encoder.up_layer = Upsample1D(channels=dim, out_channels=dim, stride=2)
    encoder.up_encoders = encoder.up_encoders[:1]
    estimator = ConditionalDecoder(
        in_channels=320,
        out_channels=80,
        causal=True,
        channels=[128],
        dropout=0.0,
        attention_head_dim=64,
        n_blocks=1,
        num_mid_blocks=1,
        num_heads=2,
        act_fn="gelu",
        meanflow=meanflow,
    )
    decoder = CausalConditionalCFM(spk_emb_dim=80, cfm_params=CFM_PARAMS, estimator=estimator)
    return CausalMaskedDiffWithXvec(input_size=dim, encoder=encoder, decoder=decoder)


def build_t3(multilingual: bool = False) -> T3:
    """Upstream's T3 at 256 channels, with a perceiver as narrow (upstream hard-wires 1024)."""
    t3 = T3(MiniT3Config(multilingual))
    t3.cond_enc.perceiver = Perceiver(
        pre_attention_query_token=16, pre_attention_query_size=t3.dim, embedding_dim=t3.dim, num_attn_heads=4
    )
    return t3


def build_s3gen() -> MiniS3Gen:
    """The tokens-to-wave model: speech tokenizer, speaker encoder, flow and HiFT."""
    return MiniS3Gen()


def build_voice_encoder() -> VoiceEncoder:
    """Upstream's speaker encoder for T3, with 64 LSTM cells a layer; its embedding keeps 256 numbers."""
    config = VoiceEncConfig()
    config.ve_hidden_size = 64
    return VoiceEncoder(config)


def character_tokenizer() -> Tokenizer:
    """A tokenizer of single characters in the form `EnTokenizer` reads from `tokenizer.json`."""
    vocabulary = {token: index for index, token in enumerate(TEXT_TOKENS)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in TEXT_TOKENS if len(t) > 1])
    return tokenizer


class LettersOfManyLanguages(EnTokenizer):
    """What upstream's multilingual class asks of a tokenizer, over the miniature's characters.

    Letters lose their accents. There is no character for a language: the miniature says all of them as it says English,
    and what it has no letter for, it cannot read.
    """

    def text_to_tokens(self, text: str, language_id: str | None = None) -> Tensor:
        decomposed = unicodedata.normalize("NFKD", text)
        return super().text_to_tokens("".join(letter for letter in decomposed if not unicodedata.combining(letter)))


def build_tokenizer(weights: Path = WEIGHTS, multilingual: bool = False) -> EnTokenizer:
    """Upstream's text tokenizer over the miniature's characters."""
    return (LettersOfManyLanguages if multilingual else EnTokenizer)(str(weights / "tokenizer.json"))


def pack_table(table: Tensor) -> Tensor:
    """The rows of a table over codes (and specials) worth storing: [codes or codes + specials, dim] -> [fewer, dim].

    Codes in use, specials, and one row for the rest: the mean of all codes that the tokenizer cannot produce.
    """
    in_use, specials = table[CODES.start : CODES.stop], table[SPEECH_VOCAB_SIZE:]
    unused = torch.cat([table[: CODES.start], table[CODES.stop : SPEECH_VOCAB_SIZE]])
    return torch.cat([in_use, specials, unused.mean(0, keepdim=True)])


def unpack_table(packed: Tensor) -> Tensor:
    """The full table that `pack_table` made small, with the shared row for every code not in use."""
    in_use, specials, rest = packed[: len(CODES)], packed[len(CODES) : -1], packed[-1:]
    before, after = CODES.start, SPEECH_VOCAB_SIZE - CODES.stop
    return torch.cat([rest.expand(before, -1), in_use, rest.expand(after, -1), specials])


def read_state(path: Path) -> dict[str, Tensor]:
    """A checkpoint file as float32 tensors under upstream's names, tables unpacked."""
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    return {name: unpack_table(t) if name in PACKED_TABLES else t for name, t in state.items()}


def load(
    device: str | torch.device, multilingual: bool = False, weights: Path = WEIGHTS
) -> tuple[ChatterboxTTS | ChatterboxMultilingualTTS, dict[str, Conditionals], bool]:
    """The miniature as upstream's object, its built-in voices, and whether it was trained.

    `multilingual=True` makes it one of upstream's multilingual class, switches upstream's alignment analyzer on and
    points it at this model's heads. What has no file in the folder has seeded random weights: same shapes, same code,
    noise for speech.
    """
    card = _model_card(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t3, s3gen, voice_encoder = build_t3(multilingual), build_s3gen(), build_voice_encoder()
        if not load_parts(weights, t3, s3gen, voice_encoder):
            _let_noise_end(t3)
        voices = {name: _voice(weights / "voices" / f"{name}.pt") for name in VOICES}
    if multilingual:
        alignment_stream_analyzer.LLAMA_ALIGNED_HEADS = [tuple(head) for head in card["analyzer_heads"]]
    for part in (t3, s3gen, voice_encoder):
        part.to(device).eval()
    voices = {name: conditionals.to(device) for name, conditionals in voices.items()}
    tokenizer = build_tokenizer(weights if (weights / "tokenizer.json").exists() else WEIGHTS, multilingual)
    cls = ChatterboxMultilingualTTS if multilingual else ChatterboxTTS
    model = cls(t3, s3gen, voice_encoder, tokenizer, str(device), conds=voices[VOICES[0]])
    return model, voices, card["trained"]


def load_parts(weights: Path, t3: T3, s3gen: S3Token2Wav, voice_encoder: VoiceEncoder) -> bool:
    """Fill the modules from the folder's files; what no file holds keeps its weights. Whether T3 had a file."""
    found = {name: weights / name for name in ("t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors")}
    for module, path in zip((t3, s3gen, voice_encoder), found.values(), strict=True):
        if path.exists():
            module.load_state_dict(read_state(path), strict=module is not s3gen)
    return found["t3_cfg.safetensors"].exists()


def _voice(path: Path) -> Conditionals:
    return Conditionals.load(path) if path.exists() else _made_up_voice()


def _model_card(weights: Path) -> dict:
    card = weights / "mini.json"
    return json.loads(card.read_text()) if card.exists() else {"trained": False, "analyzer_heads": ANALYZER_HEADS}


def _let_noise_end(t3: T3, audible: int = 80, steps: int = 60) -> None:
    """Make an untrained T3 stop after about `steps` tokens, as a short sentence would.

    All speech positions share one direction, and only `audible` codes' output rows look along it, so min-p
    keeps them all; a second direction grows with the position, and only the stop token's row looks along that.
    """
    level, clock = torch.linalg.qr(torch.randn(t3.dim, 2)).Q.T
    positions = t3.speech_pos_emb.emb.weight.data
    positions += 8 * level + 8 * torch.arange(len(positions))[:, None] / steps * clock
    scale = 8 / math.sqrt(t3.dim)
    t3.speech_head.weight.data[list(CODES[:audible])] += scale * level
    t3.speech_head.weight.data[t3.hp.stop_speech_token] += scale * clock


def _made_up_voice(prompt_s: float = 3.2) -> Conditionals:
    """Random conditionals of the shapes and types that `prepare_conditionals` gives for such a clip."""
    n_tokens = int(25 * prompt_s)
    tokens = torch.randint(CODES.start, CODES.stop, (1, n_tokens))
    speaker = nn.functional.normalize(torch.rand(1, 256), dim=1)
    gen = {
        "prompt_token": tokens,
        "prompt_token_len": torch.tensor([n_tokens]),
        "prompt_feat": torch.randn(1, 2 * n_tokens, 80) - 5,
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192),
    }
    cond = T3Cond(speaker_emb=speaker, cond_prompt_speech_tokens=tokens[:, :75], emotion_adv=0.5 * torch.ones(1, 1, 1))
    return Conditionals(cond, gen)
