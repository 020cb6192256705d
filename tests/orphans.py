"""A parent that is killed while its child is busy; it imports little, for it starts a forkserver of its own."""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from harness import worker


def load_forever(device: str, sign: str) -> None:
    Path(sign).touch()
    time.sleep(1000)


def start_a_hanging_child_and_die(folder: Path, connection: Connection) -> None:
    """The child's process id goes to `connection`."""
    worker.PRELOADED.clear()
    sign = folder / "loading"
    child = worker.Worker(worker.Setup("orphan", folder, "orphans.load_forever", {"sign": str(sign)}, "cpu"))
    child._connection.send(("load", (), 60))
    while not sign.exists():
        time.sleep(0.05)
    connection.send(child.pid)
    os.kill(os.getpid(), signal.SIGKILL)
