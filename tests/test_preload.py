"""The forkserver imports the heavy packages and must leave CUDA alone, or no child of it could use a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing
from harness import worker

def child(queue):
    import torch
    queue.put(torch.cuda._is_in_bad_fork())

if __name__ == "__main__":
    worker.PRELOADED.insert(0, "tests.fake_nvml")
    context = worker._context()
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print("poisoned:", queue.get(timeout=200))
    process.join()
"""


@pytest.mark.slow
def test_children_of_the_forkserver_can_use_cuda(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert "poisoned: False" in done.stdout, done.stdout + done.stderr
