"""`preload`: modules that a node imports once for all its ranks, and those that it cannot import so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from muster_runs import MUSTER, environment
from paths import ROOT

SCRIPT = """
import os, sys
from pathlib import Path

assert "mailcap_like" in sys.modules, "each rank would import it"
assert sys.modules["mailcap_like"].PROCESS != os.getpid()
first = Path("first")
if os.environ["RANK"] == "1" and not first.exists():
    first.touch()
    raise OSError("once")
"""
MODULES = {
    "mailcap_like": "import os\nPROCESS = os.getpid()\n",
    "busy": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n",
    "native": "import ctypes\nlibrary, thread = ctypes.CDLL(None), ctypes.c_ulong()\n"
    "wait = ctypes.cast(library.pause, ctypes.c_void_p)\n"
    "assert library.pthread_create(ctypes.byref(thread), None, wait, None) == 0\n",
    "broken": "import no_such_part\n",
    "angry": "raise ValueError('no licence')\n",
}
REFUSED = {
    "no_such_module": "preload='no_such_module': is not installed on ",
    "broken": "preload='broken': needs no_such_part, which is not installed on ",
    "angry": "preload='angry': cannot be imported once for all ranks: ValueError: no licence. Remove it",
    "busy": "preload='busy': cannot be imported once for all ranks: RuntimeError: it starts threads",
}


def run(folder: Path, modules: list[str]) -> tuple[int, str]:
    """The exit code and the output of a script of two ranks."""
    for name, text in MODULES.items():
        (folder / "installed").mkdir(exist_ok=True)
        (folder / "installed" / f"{name}.py").write_text(text)
    (folder / "job.yaml").write_text(f"script: work.py\ndevices_per_node: 2\npreload: [{', '.join(modules)}]\n")
    (folder / "work.py").write_text(SCRIPT)
    path = {"PYTHONPATH": f"{folder / 'installed'}:{ROOT}"}
    done = subprocess.run(
        [MUSTER, "run", "job.yaml"], cwd=folder, env=environment(**path), capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_modules_are_there_before_the_script_begins_and_after_a_restart(tmp_path: Path) -> None:
    """Also after one that starts a thread outside of Python, as pyarrow does."""
    code, text = run(tmp_path, ["native", "mailcap_like"])
    assert (tmp_path / "first").exists()
    assert code == 0, text


@pytest.mark.parametrize("module", REFUSED)
def test_a_module_that_cannot_be_shared_is_named(tmp_path: Path, module: str) -> None:
    code, text = run(tmp_path, ["mailcap_like", module])
    assert code == 64
    assert REFUSED[module] in text
    assert "Traceback" not in text
