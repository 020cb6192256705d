"""What optimizations require: known, registered before them, named where it is missing, enough where it is there."""

from __future__ import annotations

import pytest
import torch

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Pipeline

MAIN_PART = {"compile": {"estimator": False}}
"""Parameters that leave only what requires something."""


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline):
    yield loaded
    loaded.reset()


def others_named_in(reason: str | None, name: str) -> list[str]:
    words = (reason or "").replace(",", " ").replace(":", " ").split()
    return [other for other in optimizations.APPLIED if other in words and other != name]  # none that a test planted


def test_what_is_required_comes_before() -> None:
    order = optimizations.names()
    for name, cls in optimizations.CATALOGUE.items():
        for needed in (*cls.requires, *cls.requires_on_gpu):
            assert order.index(needed) < order.index(name)


@pytest.mark.parametrize("name", optimizations.APPLIED)
def test_with_what_it_requires_it_lacks_no_other(mini: Pipeline, name: str) -> None:
    for needed in optimizations.requirements(name, "cpu"):
        optimizations.create(needed).apply(mini)
    assert others_named_in(optimizations.create(name, MAIN_PART.get(name)).unavailable(mini), name) == []


@pytest.mark.parametrize("name", [name for name, cls in optimizations.CATALOGUE.items() if cls.only_on_gpu])
def test_what_is_for_a_gpu_only_cannot_run_on_a_cpu_whatever_else_is_on(mini: Pipeline, name: str) -> None:
    for needed in optimizations.requirements(name, "cpu"):
        optimizations.create(needed).apply(mini)
    assert optimizations.create(name).unavailable(mini)


@pytest.mark.parametrize("name", [name for name, cls in optimizations.CATALOGUE.items() if cls.requires])
def test_without_it_says_what_is_missing(mini: Pipeline, name: str) -> None:
    reason = optimizations.create(name, MAIN_PART.get(name)).unavailable(mini)
    assert others_named_in(reason, name) == list(optimizations.requirements(name, "cpu"))


@pytest.mark.parametrize("name", [name for name, cls in optimizations.CATALOGUE.items() if cls.requires_on_gpu])
def test_on_a_gpu_it_says_what_is_missing_there(mini: Pipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    if name == "flat_estimator":
        pytest.importorskip("triton")
    reason = optimizations.create(name).unavailable(mini)
    assert others_named_in(reason, name) == list(optimizations.requirements(name, "cuda:0"))
    assert optimizations.requirements(name, "cpu") == optimizations.CATALOGUE[name].requires


def test_an_unknown_device_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert optimizations.requirements("flat_estimator") == ("mixed_precision",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert optimizations.requirements("flat_estimator", "auto") == ()


@pytest.mark.parametrize(
    ("needed", "says"),
    [
        ("kv_cahce", r"wishful requires 'kv_cahce'.*did you mean kv_cache\?"),
        ("wishful", "requires 'wishful', which is not registered before it"),
    ],
)
def test_what_is_required_has_to_be_known(needed: str, says: str) -> None:
    class Wishful(optimizations.Optimization):
        name = "wishful"
        requires = (needed,)

    with pytest.raises(UserError, match=says):
        optimizations.register(Wishful)
    assert "wishful" not in optimizations.names()


def test_requirements_of_nobody_are_refused() -> None:
    with pytest.raises(UserError, match="unknown optimization 'kv_cash'"):
        optimizations.requirements("kv_cash")
