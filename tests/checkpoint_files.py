"""Checkpoints in the files of upstream's: the miniature's weights, or seeded ones of full size, under its names.

Upstream's `from_local` has its sizes hard-coded. `small` lends it the miniature's parts meanwhile, so that the reading
itself is upstream's; at full size nothing is lent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from chatterbox import mtl_tts, tts
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference import alignment_stream_analyzer
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from harness import checkpoints
from harness.mini import models as mini
from harness.pipeline import Pipeline
from harness.sampling import LANGUAGES

LANGUAGE_TOKENS = [f"[{language}]" for language in LANGUAGES]


def write_checkpoint(folder: Path, model: Any, multilingual: bool) -> Path:
    """The model's weights, tokenizer and voice under upstream's names, in upstream's formats."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"ve": model.ve, "s3gen": model.s3gen}
    states = {name: {k: v.contiguous() for k, v in part.state_dict().items()} for name, part in parts.items()}
    t3 = {name: weight.contiguous() for name, weight in model.t3.state_dict().items()}
    if multilingual:
        for name, state in states.items():
            torch.save(state, folder / f"{name}.pt")
        save_file(t3, folder / "t3_mtl23ls_v2.safetensors")
        multilingual_tokenizer().save(str(folder / "grapheme_mtl_merged_expanded_v1.json"))
    else:
        for name, state in states.items():
            save_file(state, folder / f"{name}.safetensors")
        save_file(t3, folder / "t3_cfg.safetensors")
        mini.character_tokenizer().save(str(folder / "tokenizer.json"))
    model.conds.save(folder / "conds.pt")
    return folder


def multilingual_tokenizer() -> Tokenizer:
    """The miniature's characters and upstream's tokens for languages; a space is `[SPACE]`, as in upstream's file."""
    words = [*mini.TEXT_TOKENS, *LANGUAGE_TOKENS]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words if len(word) > 1])
    return tokenizer


def with_languages(t3: T3) -> T3:
    """With a row for each token of `multilingual_tokenizer`; the letters keep theirs."""
    letters = t3.text_emb.weight.data
    t3.text_emb = torch.nn.Embedding(len(letters) + len(LANGUAGE_TOKENS), t3.dim)
    t3.text_emb.weight.data[: len(letters)] = letters
    return t3


@contextmanager
def small() -> Iterator[None]:
    """Within, upstream's classes build the miniature's parts, and no hub is asked."""

    def t3(hp: T3Config | None = None) -> T3:
        return mini.build_t3() if hp is None else with_languages(mini.build_t3(multilingual=True))

    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        parts = {"T3": t3, "S3Gen": mini.build_s3gen, "VoiceEncoder": mini.build_voice_encoder}
        with mock.patch.multiple(tts, **parts), mock.patch.multiple(mtl_tts, **parts):
            yield


def load(name: str, device: str, checkpoint_dir: str, seed: int = 0) -> Pipeline:
    """A loader as `pipeline.loader` names one: this project's own, among small parts."""
    heads = mini._model_card(mini.WEIGHTS)["analyzer_heads"]  # upstream's are of layers that the miniature lacks
    alignment_stream_analyzer.LLAMA_ALIGNED_HEADS = [tuple(head) for head in heads]
    with small():
        return checkpoints.load(name, device, checkpoint_dir, seed)


def full_size(multilingual: bool) -> Any:
    """Upstream's modules at full size with weights from a seed, as an object of upstream's class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t3 = T3(T3Config.multilingual() if multilingual else T3Config.english_only())
        cls = mtl_tts.ChatterboxMultilingualTTS if multilingual else tts.ChatterboxTTS
        voice = checkpoints._random_voice(t3.hp)
        return cls(t3.eval(), S3Gen().eval(), VoiceEncoder().eval(), None, "cpu", conds=voice)
