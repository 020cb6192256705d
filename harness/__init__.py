"""A benchmark and ablation harness for Chatterbox TTS inference optimizations."""

import sys

WINDOWS = (
    "this harness runs on Linux; on Windows run it inside WSL, which is one "
    "(https://learn.microsoft.com/windows/wsl/install)"
)

if sys.platform == "win32":  # before anything is imported that is not there: fcntl, resource, a forkserver
    print(f"error: {WINDOWS}", file=sys.stderr)
    raise SystemExit(2)
