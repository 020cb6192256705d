"""Shared by all tests: the project's root on the path, and a forkserver that is warm by the time it is needed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
