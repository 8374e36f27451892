"""Scripts of people who never thought of Muster: what they find in a rank is what an interpreter of their own has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from muster_runs import environment, muster
from ranks import free_port

from trainer.run.folder import RunFolder

FACTS = """
import atexit, json, multiprocessing, os, pickle, runpy, sys, threading, time
import numpy
import trainer, statistics, in_src
from torch.utils.data import DataLoader, TensorDataset
import torch

class Thing: pass

def double(number):
    return 2 * number, __name__

kept = open(f"kept-{os.environ.get('RANK')}.txt", "w")
kept.write("never closed")

def keep():
    return kept

atexit.register(lambda: print("at exit", pickle.loads(pickle.dumps(Thing)) is Thing))
if __name__ == "__main__":
    loader = DataLoader(TensorDataset(torch.arange(4.0)), num_workers=1, collate_fn=lambda items: items[0][0])
    facts = {
        "argv": sys.argv, "orig_argv": sys.orig_argv[-len(sys.argv) :], "file": __file__, "first": sys.path[0],
        "main": [str(globals()[name]) for name in ("__spec__", "__package__", "__doc__", "__cached__")],
        "process": [multiprocessing.current_process().name, str(multiprocessing.parent_process())],
        "method": multiprocessing.get_start_method(allow_none=True), "sum": sum(map(float, loader)),
        "streams": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors, sys.stdout is sys.__stdout__],
        "theirs": [trainer.Engine.name, statistics.name, in_src.name], "working": os.getcwd(),
    }
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        facts["spawned"] = pool.map(double, [21])
    facts["parent"] = multiprocessing.parent_process() is None
    drawn = float(numpy.random.rand())
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    print(json.dumps(facts))
    print(drawn)
"""
LOOP = """
import multiprocessing, os, sys
import torch
import torch.distributed as dist
import trainer.loop
from .names import NAME

multiprocessing.set_start_method("spawn")
os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", sys.argv[1]
sys.excepthook = lambda kind, error, trace: print("their hook:", error, flush=True)
dist.init_device_mesh("cpu", (2,))
total = torch.ones(1)
dist.all_reduce(total)
print("together", NAME, trainer.loop.name, int(total), __package__, __spec__.name, end="", flush=True)
dist.destroy_process_group()
if "--fail" in sys.argv:
    raise KeyError("the end")
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_script_finds_what_its_own_interpreter_has(tmp_path: Path) -> None:
    """Its modules among them, whatever they are called; and it is told that its ranks never met."""
    words = ["--lr", "1e-3", "--amp", "no", "--id", "007", "--from", "null", "--to", "~", "two words"]
    write(tmp_path, {
        "code/facts.py": FACTS, "code/trainer/__init__.py": "class Engine: name = 'mine'\n",
        "code/statistics.py": "name = 'mine too'\n", "src/in_src.py": "name = 'of src'\n", "trainer.py": "1 / 0\n",
        "a job, it is: mine.yaml": f"script: code/facts.py\nscript_args: [{', '.join(words)}]\n"
        "devices_per_node: 2\ndevice: cpu\n",
    })  # fmt: skip
    done = muster("run", "a job, it is: mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path / 'src'}"
    command = [sys.executable, "-u", "code/facts.py", *words]
    plain = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    (run,) = map(RunFolder, (tmp_path / "runs").glob("a-job-it-is-mine-*"))
    texts = [plain.stdout, *(run.rank_log(rank).read_text() for rank in range(2))]
    ends = [text[text.index("{") :].splitlines() for text in texts]  # before that, processes of the script print
    facts, numbers, lasts = zip(*((json.loads(end[0]), float(end[1]), end[2:]) for end in ends), strict=True)
    assert facts[0] == facts[1] == facts[2]
    assert len(set(numbers)) == 3, "some process draws the random numbers of another"
    assert lasts == (["thread done", "at exit True"],) * 3
    assert {path.read_text() for path in tmp_path.glob("kept-*.txt")} == {"never closed"}
    note = "2 ranks ran the script, and none joined a process group with another"
    assert note in done.stdout and note in muster("status", run).stdout


def test_a_module_that_meets_at_a_port_of_its_own(tmp_path: Path) -> None:
    """`-m package.module` has relative imports; what it says last and how it ends are its own."""
    write(tmp_path, {
        "lib/pack/__init__.py": "", "lib/trainer/loop.py": "name = 'theirs'\n",
        "lib/pack/names.py": "NAME = 'relative'\n", "lib/pack/loop.py": LOOP,
        "job-file.yaml": f"script: -m pack.loop\nscript_args: ['{free_port()}']\npython_path: [lib]\n"
        "devices_per_node: 2\ndevice: cpu\nagent: {restarts: 0}\n",
    })  # fmt: skip
    done = muster("run", "job-file.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "together relative theirs 2 pack pack.loop" in done.stdout and "note:" not in done.stdout
    done = muster("run", "job-file.yaml", f"script_args=['{free_port()}', --fail]", cwd=tmp_path)
    assert done.returncode == 1
    assert "their hook: 'the end'" in done.stdout and "[user code]: KeyError: 'the end'" in done.stderr
    done = muster("run", "job-file.yaml", "python_path=[nowhere]", cwd=tmp_path)
    assert done.returncode == 64 and "python_path='nowhere': is not in" in done.stderr


SESSION = """
from trainer.model import NAME

import muster

with muster.Session() as session:
    for batch in session.batches(list(range(32)), batch_size=8):
        session.log(loss=batch.float().mean())
    print("mine:", NAME, "step", session.step, flush=True)
"""


def test_a_session_beside_a_module_that_is_called_as_our_package_is(tmp_path: Path) -> None:
    """Both are found, unless parts of them have the same names; then the error says which."""
    write(tmp_path, {"trainer/__init__.py": "", "trainer/model.py": "NAME = 'theirs'\n", "train.py": SESSION,
                     "job-file.yaml": "script: train.py\ndevices_per_node: 2\ndevice: cpu\n"})  # fmt: skip
    done = muster("run", "job-file.yaml", cwd=tmp_path)
    assert done.returncode == 0 and "mine: theirs step 4" in done.stdout, done.stdout + done.stderr
    write(tmp_path, {"trainer/data.py": ""})
    plain = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert "has parts with names of Muster's own: data. Rename it" in plain.stderr
