"""What an application imports: `from chatterbox_harness import optimize`."""

from harness.application import OptimizedTTS, optimize
from harness.errors import UserError

__all__ = ["OptimizedTTS", "UserError", "optimize"]
