"""In an application: upstream's object, faster.

    tts = optimize(ChatterboxTTS.from_pretrained("cuda"), "production")
    wave = tts.generate("Hello there.")    # upstream's own signature and tensor, [1, samples]
    for piece in tts.stream("Hello."): ... # the same in pieces, as they are ready: with the combo "streaming"
    tts.report()                           # what is active, what is not and why, the evidence
    tts.restore()                          # upstream's object, as it was

The object changes in place, for its modules are what the optimizations work on: until `restore` gives it back, it
speaks through the one that `optimize` returns.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from chatterbox.mtl_tts import SUPPORTED_LANGUAGES, ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS
from torch import Tensor

from harness.combos import read_combo
from harness.config import check_together
from harness.declared import imported
from harness.errors import UserError
from harness.fitting import fit
from harness.pipeline import Pipeline, random_numbers_kept
from harness.plugins import import_catalogue
from harness.sampling import Sampling

Combo = str | Path | Mapping[str, Any]

VOICE = "the voice in use"
"""What the pipeline calls upstream's `conds`."""
PARAMETERS = {field.name for field in fields(Sampling)} - {"max_new_tokens", "top_k"}
"""What `generate` takes beside the text, the clip and the language."""

_optimized: weakref.WeakSet[Any] = weakref.WeakSet()


def optimize(tts: Any, combo: Combo = "production") -> OptimizedTTS:
    """A faster `tts`, which is a `ChatterboxTTS` or a `ChatterboxMultilingualTTS` with a voice.

    `combo` is the name of a file in `configs/combo`, the path of a YAML file like those, or a mapping from
    optimizations to their parameters, such as {"kv_cache": {"bucket": 64}}. What cannot run here is left out, and
    `report` says why. PyTorch's random numbers are left as they were.

    Raises UserError for an object that cannot be optimized, or is already, and for a combo that cannot be read.
    """
    if isinstance(tts, OptimizedTTS) or tts in _optimized:
        raise UserError(
            "this object is optimized already: call restore() on what optimize() returned, then optimize it"
        )
    if not isinstance(tts, ChatterboxTTS | ChatterboxMultilingualTTS):
        kind = type(tts).__name__
        raise UserError(f"optimize takes a ChatterboxTTS or a ChatterboxMultilingualTTS, and this is a {kind}")
    if tts.conds is None:
        raise UserError("this object has no voice yet: call its prepare_conditionals(clip) before optimize()")
    return OptimizedTTS(tts, combo)


class OptimizedTTS:
    """What `optimize` returns: `generate` is faster, and every other attribute is upstream's own.

    Calls from several threads take turns: there is one model, and its buffers belong to whoever speaks.
    """

    def __init__(self, tts: Any, combo: Combo) -> None:
        catalogue = import_catalogue()
        self._combo, toggles = read_combo(combo, catalogue)
        check_together(imported(catalogue), toggles)
        self._tts = tts
        self._turn = threading.RLock()
        self._signature = inspect.signature(tts.generate)
        self.generate = functools.wraps(tts.generate)(functools.partial(self._generate))
        defaults = {name: parameter.default for name, parameter in self._signature.parameters.items()}
        self._conds, tts.conds = tts.conds, _copied(tts.conds)
        self._pipeline = Pipeline(tts, torch.device(tts.device), {VOICE: tts.conds}, sampling=_sampling(defaults))
        self._in_place = True
        self._is_streaming = False
        _optimized.add(tts)
        try:
            with random_numbers_kept(self._pipeline.device):
                self._fitted = fit(self._unchanged_pipeline, toggles, catalogue.create)
        except BaseException:
            self.restore()
            raise
        for name, status in self._fitted.statuses.items():
            if status["status"] == "failed":
                reason = status["reason"].strip().splitlines()[-1]
                warnings.warn(f"{name} failed and is left out: {reason}", stacklevel=3)

    def _generate(self, *args: Any, **kwargs: Any) -> Tensor:
        text, voice, sampling, language = self._asked(*args, **kwargs)
        with self._turn, self._settings(sampling, language):
            wave = self._pipeline.synthesize(text, voice, seed=None).wave
        return torch.from_numpy(wave).unsqueeze(0)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """`generate` in pieces [1, samples], as they are ready; put end to end they are the utterance.

        Without the optimization `streaming` there is one, at the end. Until the last piece is taken, or the iterator
        closed, the object speaks nothing else: other threads wait.
        """
        text, voice, sampling, language = self._asked(*args, **kwargs)
        return self._stream(text, voice, sampling, language)

    def _stream(self, text: str, voice: str, sampling: Sampling, language: str | None) -> Iterator[Tensor]:
        with self._turn, self._settings(sampling, language):
            self._is_streaming = True
            try:
                for chunk in self._pipeline.synthesize_stream(text, voice, seed=None):
                    yield torch.from_numpy(chunk.wave).unsqueeze(0)
            finally:
                self._is_streaming = False

    def _asked(self, *args: Any, **kwargs: Any) -> tuple[str, str, Sampling, str | None]:
        """Text, voice, sampling and language of a call of `generate`."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        asked = call.arguments
        language = asked.get("language_id")
        if language and language.lower() not in SUPPORTED_LANGUAGES:
            raise ValueError(f"language_id={language!r}: upstream speaks {', '.join(SUPPORTED_LANGUAGES)}")
        return asked["text"], asked["audio_prompt_path"] or VOICE, _sampling(asked), language and language.lower()

    def prepare_conditionals(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's: from now on, speak with this clip's voice."""
        with self._turn:
            self._tts.prepare_conditionals(*args, **kwargs)

    def report(self) -> dict[str, Any]:
        """The combo's optimizations by status, the reasons, and the evidence, for which a few short probes are spoken.

        {"combo": name, "active": [names], "inactive": {name: reason}, "unavailable": {name: reason},
        "failed": {name: traceback}, "evidence": {name: facts}}
        """
        pipeline = self._pipeline
        with (
            self._turn,
            self._settings(pipeline.sampling, pipeline.language),
            random_numbers_kept(pipeline.device),
        ):
            statuses = self._fitted.evidence()

        def reasons(wanted: str) -> dict[str, str]:
            return {name: status["reason"] for name, status in statuses.items() if status["status"] == wanted}

        return {
            "combo": self._combo,
            "active": list(reasons("active")),
            **{wanted: reasons(wanted) for wanted in ("inactive", "unavailable", "failed")},
            "evidence": {name: status["evidence"] for name, status in statuses.items() if status["evidence"]},
        }

    def restore(self) -> Any:
        """Undo everything, and give back upstream's object with the weights and the voice that it came with."""
        with self._turn:
            if self._in_place:
                self._pipeline.reset()
                self._tts.conds = self._conds
                self._in_place = False
                _optimized.discard(self._tts)
        return self._tts

    # -- what stands between upstream's object and the pipeline --------------------------------------------------

    @contextmanager
    def _settings(self, sampling: Sampling, language: str | None) -> Iterator[None]:
        """One call's settings, and the voice that upstream's object has now."""
        if not self._in_place:
            raise UserError("this object was restored: use upstream's, or optimize that again")
        if self._is_streaming:
            raise UserError("a stream is not over yet: take its last piece, or close() it, before you ask for more")
        pipeline = self._pipeline
        kept = pipeline.sampling, pipeline.language
        pipeline.voices[VOICE] = self._tts.conds
        pipeline.sampling, pipeline.language = sampling, language
        try:
            yield
        finally:
            pipeline.sampling, pipeline.language = kept

    def _unchanged_pipeline(self) -> Pipeline:
        self._pipeline.reset()
        return self._pipeline

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tts, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "generate":
            super().__setattr__(name, value)
        else:
            setattr(self._tts, name, value)


def _sampling(arguments: Mapping[str, Any]) -> Sampling:
    return Sampling(**{name: arguments[name] for name in PARAMETERS})


def _copied(conditionals: Any) -> Any:
    """The same tensors in containers of their own: `generate` writes a new exaggeration into them."""
    return type(conditionals)(copy.copy(conditionals.t3), dict(conditionals.gen))
