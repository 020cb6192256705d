"""How a model is asked to speak: the arguments of upstream's `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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
