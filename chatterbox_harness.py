"""What an application imports: `from chatterbox_harness import optimize`."""

import sys

if sys.platform == "win32":  # an application is told; a command of the harness's ends with the same line
    raise ImportError("chatterbox_harness runs on Linux; on Windows run the application inside WSL")

from harness.application import OptimizedTTS, optimize
from harness.errors import UserError

__all__ = ["OptimizedTTS", "UserError", "optimize"]
