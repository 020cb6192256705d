"""A reference clip is analysed once, not once per call."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.pipeline import Pipeline, Stage
from harness.settings import number
from optimizations.base import Evidence, Optimization, register


@register
class ConditioningCache(Optimization):
    """Conditionals kept by the content of the reference clip.

    Baseline: `generate(audio_prompt_path=...)` loads, resamples and analyses the clip in every call: S3 tokenizer
    twice, CAMPPlus, VoiceEncoder, mel.
    This: the result is kept under the clip's SHA-256 and the exaggeration, so a clip that was edited under the same
    name is analysed again. The same object comes back each time, which lets `kv_cache` find its voice prefix.
    Why: the analysis takes longer than a short sentence; a service speaks with the same few voices all day.
    Where not: built-in voices, whose conditionals are loaded with the checkpoint.
    The campaign had nothing of the kind.
    Evidence: clips analysed and calls served from the cache.
    """

    name = "conditioning_cache"
    extra = True

    @dataclass
    class Config:
        """`size`: voices that are kept; the least recently used one goes first."""

        size: int = number(32, least=1)

    def apply(self, pipeline: Pipeline) -> None:
        self.n_hits = self.n_misses = 0
        self._kept: OrderedDict[tuple[str, float], Any] = OrderedDict()

        def cached(condition: Stage) -> Stage:
            def run(voice: str) -> Any:
                return condition(voice) if voice in pipeline.voices else self._lookup(condition, voice, pipeline)

            return run

        pipeline.wrap_stage("condition", cached)

    def _lookup(self, condition: Stage, clip: str, pipeline: Pipeline) -> Any:
        key = hashlib.sha256(Path(clip).read_bytes()).hexdigest(), pipeline.sampling.exaggeration
        if key in self._kept:
            self.n_hits += 1
            self._kept.move_to_end(key)
        else:
            self.n_misses += 1
            self._kept[key] = condition(clip)
            if len(self._kept) > self.config.size:
                self._kept.popitem(last=False)
        pipeline.model.conds = self._kept[key]
        return self._kept[key]

    def evidence(self, pipeline: Pipeline) -> Evidence:
        facts = {"clips_analysed_count": self.n_misses, "calls_from_cache_count": self.n_hits}
        if not self.n_hits:
            return Evidence(False, facts, "no reference clip was used twice; built-in voices need no analysis")
        return Evidence(True, facts)
