"""Shared by all tests: the project's root on the path, so that its modules import as the commands do; one thread."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# Two workers share two cores; a second thread in each would only wait for the first. Set before PyTorch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  # now that it can only take one thread

from harness.worker import PRELOADED  # noqa: E402  # found only now

# A process has one forkserver, and whichever test needs it first starts it: without the heavy packages in it, every
# child of the tests that follow would import them for itself.
multiprocessing.set_forkserver_preload(PRELOADED)


@pytest.fixture
def own_locks(tmp_path_factory, monkeypatch):
    """Jobs of a test do not wait for those that somebody measures beside it; times are no matter here."""
    from harness import devices

    monkeypatch.setattr(devices, "LOCKS", tmp_path_factory.mktemp("locks"))


@pytest.fixture(autouse=True)
def _arithmetic_as_before():
    """A test that leaves another precision or number of threads behind has failed, not those that come after it."""
    before = _arithmetic()
    yield
    assert _arithmetic() == before


def _arithmetic():
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
