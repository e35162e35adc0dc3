"""Lets the tests import `adapters` and `read_golden` by their plain names, as any program does that has this folder on its path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
