"""Every pair of the twelve composes, or is refused with a reason."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import optimizations
from harness import checkpoints
from harness.errors import UserError

TEXT = "It rains. Stay here."
N_TOKENS = 8
PARAMS = {
    "token_sequence": {"target_tokens": 15},  # so that the smoke text has two segments
    "warmup": {"levels": 1},
    "channels_last": {"modules": ["vocoder"]},  # `auto` would time every convolution anew in each pair
}
PAIRS = list(combinations(optimizations.TWELVE, 2))
NEIGHBOURS = set(pairwise(optimizations.TWELVE))
"""Each of the twelve but the first and the last twice: these pairs are tried always, the others with `-m slow`."""


@pytest.fixture(scope="module")
def mini():
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def baseline(mini):
    return mini.synthesize(TEXT, next(iter(mini.voices)), seed=4, n_tokens=N_TOKENS)


def test_the_twelve_are_twelve_and_registered():
    assert len(set(optimizations.TWELVE)) == 12
    assert set(optimizations.names()) >= {*optimizations.TWELVE, *optimizations.EXTRAS}
    assert len(PAIRS) == 66


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if pair in NEIGHBOURS else pytest.mark.slow, id="+".join(pair)) for pair in PAIRS],
)
def test_pair(mini, baseline, pair):
    plugins = [optimizations.create(name, PARAMS.get(name)) for name in pair]
    refusal = None
    try:
        runnable = []
        for plugin in plugins:
            if reason := plugin.unavailable(mini):
                assert len(reason) > 20, "a reason that a user can act on"
                continue
            plugin.apply(mini)
            runnable.append(plugin)
        spoken = mini.synthesize(TEXT, next(iter(mini.voices)), seed=4, n_tokens=N_TOKENS)
        assert np.isfinite(spoken.wave).all()
        assert spoken.audio_s == pytest.approx(baseline.audio_s, rel=0.05)  # a cross-fade overlaps a little
        if all(plugin.lossless for plugin in runnable):
            assert torch.equal(spoken.tokens[0], baseline.tokens[0])
    except UserError as error:
        refusal = str(error)
    finally:
        mini.reset()
    assert refusal is None or all(name in refusal for name in pair), "a refusal names both"


def test_nothing_of_66_pairs_stays_behind(mini, baseline):
    """Runs last in this file: the pipeline that went through all pairs is still the baseline, bit for bit."""
    again = mini.synthesize(TEXT, next(iter(mini.voices)), seed=4, n_tokens=N_TOKENS)
    np.testing.assert_array_equal(again.wave, baseline.wave)
