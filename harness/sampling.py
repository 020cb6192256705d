"""How a model is asked to speak: the arguments of upstream's `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from harness.errors import UserError

LANGUAGES = (
    *("ar", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "it", "ja"),
    *("ko", "ms", "nl", "no", "pl", "pt", "ru", "sv", "sw", "tr", "zh"),
)
"""Those of upstream's multilingual model."""
COLDEST = 0.01
"""The lowest temperature to draw at: far below it, logits divided by it leave the range of float32."""


@dataclass(frozen=True)
class Sampling:
    """The arguments of `generate` that say how to speak, with the defaults of upstream's English model.

    Temperature 0 is greedy: the likeliest token, nothing drawn. Without a `cfg_weight` there is no guidance, and no row
    for it.
    """

    temperature: float = 0.8
    cfg_weight: float = 0.5
    min_p: float = 0.05
    top_p: float = 1.0
    repetition_penalty: float = 1.2
    exaggeration: float = 0.5
    max_new_tokens: int = 1000
    top_k: int = 0
    """0: any token may win."""

    penalizes_last: ClassVar[bool] = False
    """Whether repetitions are penalized among what the other filters have left, and not before them."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def guided(self) -> bool:
        return self.cfg_weight > 0


@dataclass(frozen=True)
class TurboSampling(Sampling):
    """The arguments and defaults of upstream's Turbo, which knows neither guidance nor min-p nor exaggeration.

    Its loop caps what follows the first token, and penalizes last: with temperature 0, nothing.
    """

    cfg_weight: float = 0.0
    min_p: float = 0.0
    top_p: float = 0.95
    exaggeration: float = 0.0
    max_new_tokens: int = 1001
    top_k: int = 1000

    penalizes_last: ClassVar[bool] = True


ENGLISH = Sampling()
MULTILINGUAL = Sampling(repetition_penalty=2.0)
TURBO = TurboSampling()
DEFAULTS = {
    "mini": ENGLISH,
    "mini_multilingual": ENGLISH,  # the miniature was not made for a penalty of 2
    "chatterbox": ENGLISH,
    "multilingual": MULTILINGUAL,
    "random": ENGLISH,
    "random_multilingual": MULTILINGUAL,
    "turbo": TURBO,
    "nano": TURBO,
    "random_turbo": TURBO,
    "random_nano": TURBO,
    "tiny_turbo": TURBO,
}
"""What each of this project's pipelines takes where a configuration says nothing."""
LANGUAGE = "en"
"""What a multilingual pipeline speaks where nothing is said."""


def ask(pipeline: Any, sampling: Mapping[str, Any], language: str | None) -> Any:
    """A loaded pipeline, which speaks so from now on; where nothing is asked for, as its loader had it."""
    if sampling:
        pipeline.sampling = replace(pipeline.sampling, **sampling)
    if language:
        pipeline.language = language
    return pipeline


# -- what a configuration says of it: the group `pipeline`, as plain data ----------------------------------------------


def given(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of sampling that a configuration gives; null leaves it to the loader."""
    return {name: value for name, value in (pipeline.get("sampling") or {}).items() if value is not None}


def changed(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """What it gives that is not the pipeline's default anyway."""
    usual = vars(DEFAULTS[pipeline["name"]]) if pipeline.get("name") in DEFAULTS else {}
    return {name: value for name, value in given(pipeline).items() if usual.get(name) != value}


def label(pipeline: Mapping[str, Any]) -> str:
    """A pipeline's name, with what is not the default: what it says is another experiment.

    >>> label({"name": "mini_multilingual", "language": "fr", "sampling": {"cfg_weight": 0.0}})
    'mini_multilingual (language=fr, cfg_weight=0)'
    """
    language = pipeline.get("language") or LANGUAGE
    told = {"language": language} if language != LANGUAGE else {}
    settings = [f"{name}={_short(value)}" for name, value in (told | changed(pipeline)).items()]
    name = str(pipeline.get("name") or "unknown")
    return f"{name} ({', '.join(settings)})" if settings else name


def overrides(pipeline: Mapping[str, Any]) -> list[str]:
    """The words of a command line that ask for it."""
    other = (pipeline.get("language") or LANGUAGE) != LANGUAGE
    language = [f"pipeline.language={pipeline['language']}"] if other else []
    settings = [f"pipeline.sampling.{name}={_short(value)}" for name, value in changed(pipeline).items()]
    return [f"pipeline={pipeline.get('name', 'unknown')}", *language, *settings]


def check_speaking(pipeline: Mapping[str, Any]) -> None:
    """Raises UserError for what the model has no ear for: a setting, a temperature to draw at, a language."""
    for name, value in changed(pipeline).items():
        if name in unknown_to(pipeline["name"]):
            raise UserError(
                f"pipeline.sampling.{name}={_short(value)}: the pipeline {pipeline['name']} has no such setting; leave "
                f"out {', '.join(unknown_to(pipeline['name']))}"
            )
    temperature = given(pipeline).get("temperature")
    if temperature is not None and 0 < temperature < COLDEST:
        raise UserError(
            f"pipeline.sampling.temperature={temperature:g}: give 0 for the likeliest token, or {COLDEST} or more"
        )
    check_language(pipeline, pipeline.get("language"), "pipeline.language")


def unknown_to(name: str) -> tuple[str, ...]:
    """The settings that upstream's class of a pipeline has no argument for; none where the pipeline is a stranger's."""
    if name not in DEFAULTS:
        return ()
    return ("cfg_weight", "exaggeration", "min_p") if isinstance(DEFAULTS[name], TurboSampling) else ("top_k",)


def check_language(pipeline: Mapping[str, Any], language: str | None, where: str) -> None:
    """Raises UserError for a language that one of this project's pipelines does not speak; `where` is its place."""
    name = pipeline["name"]
    if language is None or name not in DEFAULTS:
        return
    known = LANGUAGES if "multilingual" in name else (LANGUAGE,)
    if language in known:
        return
    near = language.lower().replace("_", "-").split("-")[0]
    meant = f" (did you mean {near}?)" if near in known else ""
    if known == LANGUAGES:
        raise UserError(
            f"{where}={language}: the pipeline {name} does not speak it{meant}; it knows {', '.join(LANGUAGES)}"
        )
    raise UserError(
        f"{where}={language}: the pipeline {name} speaks English only{meant}; leave it out, or choose "
        f"{'mini_multilingual' if name.startswith('mini') else 'multilingual'}"
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
