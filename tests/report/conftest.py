"""Lets the tests import `workdirs`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
