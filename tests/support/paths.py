"""Where the project and the tests' support modules lie, for tests that read files or start processes."""

import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
"""The modules, tasks and job files that tests share; a process that imports them has it on its path."""
ROOT = SUPPORT.parents[1]
MUSTER = str(Path(sys.executable).with_name("muster"))
"""The command, as this environment has it."""
