"""Which judges there are, and whether they can be had: found out in seconds, and before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import hub
from harness.errors import UserError

WHISPER = "openai/whisper-large-v3"
WHISPER_ELSE = ("quality.asr_model", "quality.asr=pocketsphinx")
WAVLM = "microsoft/wavlm-base-plus-sv"
WAVLM_ELSE = ("quality.speaker_model", "quality.speaker=resemblyzer")
"""The setting that names the model, and what needs none."""


def check_judges(config: Mapping[str, Any]) -> None:
    """Raises, before anything is measured, the UserError that scoring would raise after it, on this machine."""
    if config.get("score") == "later":
        return
    check_transcriber(config.get("asr", "pocketsphinx"), config.get("asr_model"))
    check_encoder(config.get("speaker", "resemblyzer"), config.get("speaker_model"))


def check_transcriber(name: str, model: str | None = None) -> None:
    """Raises UserError for a recognizer that is unknown, or whose model cannot be had."""
    if name not in ("pocketsphinx", "whisper"):
        raise UserError(f"quality.asr={name}: there is pocketsphinx and whisper")
    if name == "whisper":
        check_model(model or WHISPER, *WHISPER_ELSE)


def check_encoder(name: str, model: str | None = None) -> None:
    """Raises UserError for a speaker model that is unknown, or that cannot be had."""
    if name not in ("resemblyzer", "wavlm"):
        raise UserError(f"quality.speaker={name}: there is resemblyzer and wavlm")
    if name == "wavlm":
        check_model(model or WAVLM, *WAVLM_ELSE)


def check_model(model: str, setting: str, instead: str) -> None:
    """Raises UserError if a model of transformers is in no folder, in no cache and on no hub that answers."""
    if reason := hub.why_not(model, hub.TRANSFORMER):
        raise cannot_load(model, reason, setting, instead)


def cannot_load(model: str, reason: str, setting: str, instead: str) -> UserError:
    return UserError(
        f"{setting}: {model} cannot be loaded ({reason}): connect to its hub, name a local folder, or use {instead}"
    )
