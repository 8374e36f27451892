"""From the start of a command to the first all-reduce and the first optimizer step of two ranks, by launcher.

All start the same unmodified script (`bench/tiny.py`), by turns, so that a noisy machine slows all of them; ratios are
taken within a round. "With a session": the same training on `muster.Session` (`bench/tiny_session.py`). CPU time is
that of the whole command, from its start until all its processes are gone. Beside them the least that any launcher can
take: a Python that imports torch, and what the first step of DDP imports.

    python bench/launch.py [--rounds 15] [--quick] [--output bench/results/launch.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from measure import BIN, SESSION, TRAINING, show, spread, table

BASE = "torchrun"
IMPORT, DYNAMO = "import torch", "import torch, torch._dynamo"
LIMIT_S = 120.0
GOALS = {"all-reduce": (IMPORT, 0.65, 0.3), "step": (DYNAMO, 0.7, 0.4)}
"""Of our launch: the import to compare with, the largest ratio to torchrun, the most seconds beyond the import."""
GATE = 1.0
"""What fails `--quick`: a ratio to torchrun above it, where noise is not too high to tell."""


@dataclass
class Launcher:
    """One row: how to start the training in a folder, and the package that must be there."""

    name: str
    command: Callable[[Path, list[str]], list[str | Path]]
    package: str | None = None


def _torchrunx(folder: Path, words: list[str]) -> list[str | Path]:
    program = folder / "start.py"
    argv = [str(TRAINING), *words]
    program.write_text(
        "import torchrunx\n\n\ndef train():\n    import runpy, sys\n\n"
        f"    sys.argv = {argv!r}\n    runpy.run_path(sys.argv[0], run_name='__main__')\n\n\n"
        "if __name__ == '__main__':\n"
        "    torchrunx.Launcher(hostnames=['localhost'], workers_per_host=2, backend='gloo').run(train)\n"
    )
    return [sys.executable, program]


def _python(code: str) -> Callable[[Path, list[str]], list[str | Path]]:
    return lambda folder, words: [sys.executable, "-c", code]


def _muster(*start: str | Path, script: Path = TRAINING) -> Callable[[Path, list[str]], list[str | Path]]:
    return lambda folder, words: [*start, measure.write_job(folder, words, script, devices_per_node=2)]


def _prefix(*start: str | Path, script: Path = TRAINING) -> Callable[[Path, list[str]], list[str | Path]]:
    return lambda folder, words: [*start, script, *words]


TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node=2")
ACCELERATE = (
    BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no",
)  # fmt: skip
LAUNCHERS = [
    Launcher(IMPORT, _python(IMPORT)),
    Launcher(DYNAMO, _python(DYNAMO)),
    Launcher("muster run", _muster(BIN / "muster", "run")),
    Launcher("python -m trainer", _muster(sys.executable, "-m", "trainer")),
    Launcher("muster run, with a session", _muster(BIN / "muster", "run", script=SESSION)),
    Launcher(BASE, _prefix(*TORCHRUN)),
    Launcher(f"{BASE}, with a session", _prefix(*TORCHRUN, script=SESSION)),
    Launcher("accelerate launch", _prefix(*ACCELERATE), "accelerate"),
    Launcher("torchrunx", _torchrunx, "torchrunx"),
]
IMPORTS = (IMPORT, DYNAMO)
OURS = ("muster run", "python -m trainer")


def launch(launcher: Launcher) -> dict[str, float]:
    """Start the training once; seconds to each mark of the last rank to make it, to the end, and of CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        marks = folder / "marks"
        command = launcher.command(folder, ["--marks", str(marks)])
        used, started = measure.cpu_s(), time.time()
        process = measure.start(command, folder)
        code = process.wait(LIMIT_S)
        measure.wait_all(30)
        found = {"end": time.time() - started, "cpu": measure.cpu_s() - used}
        if launcher.name in IMPORTS:
            return found
        for what in ("begin", "all-reduce", "step"):
            times = [mark.time for mark in measure.read_marks(marks) if mark.what == what]
            if code or len(times) != 2:
                raise SystemExit(f"{launcher.name} failed ({code}):\n{(folder / 'output.txt').read_text()[-3000:]}")
            found[what] = max(times) - started
        return found


def measure_all(launchers: list[Launcher], rounds: int) -> dict[str, list[dict[str, float]]]:
    """All launchers by turns, after one round that only fills the machine's file cache."""
    found: dict[str, list[dict[str, float]]] = {launcher.name: [] for launcher in launchers}
    for number in range(rounds + 1):
        turn = number % len(launchers)
        for launcher in launchers[turn:] + launchers[:turn]:
            result = launch(launcher)
            if number:
                found[launcher.name].append(result)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def summarize(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each launcher: seconds, and ratios to torchrun and differences to the imports, round by round."""
    rows = []
    for name, results in found.items():
        row: dict[str, Any] = {"launcher": name, "rounds": len(results)}
        keys = ("cpu", "end") if name in IMPORTS else ("all-reduce", "step", "cpu", "end")
        for key in keys:
            row[key] = {"s": spread([result[key] for result in results])}
            pairs = list(zip(results, found[BASE], strict=True))
            if name not in IMPORTS or key == "cpu":
                row[key]["ratio"] = spread([ours[key] / base[key] for ours, base in pairs])
            if key in GOALS and GOALS[key][0] in found:
                least = found[GOALS[key][0]]
                row[key]["beyond_import_s"] = spread(
                    [ours[key] - base["end"] for ours, base in zip(results, least, strict=True)], absolute=True
                )
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Two tables, as text: seconds, and ratios with the goals."""
    seconds = [["seconds, median [quartiles]", "all-reduce", "step", "end", "CPU time"]]
    ratios = [["ratio to torchrun", "all-reduce", "step", "CPU time"]]
    for row in rows:
        cells = {key: row.get(key) for key in ("all-reduce", "step", "end", "cpu")}
        seconds.append([row["launcher"], *(show(cell and cell["s"]) for cell in cells.values())])
        if row["launcher"] not in (BASE, *IMPORTS):
            ratios.append([row["launcher"], *(show(row[key]["ratio"]) for key in ("all-reduce", "step", "cpu"))])
    return f"{table(seconds)}\n\n{table(ratios)}"


def goals(rows: list[dict[str, Any]]) -> str:
    """What each goal says of our launches."""
    lines = [["goals", "goal", "measured", ""]]
    for row in rows:
        for key, (least, ratio, beyond) in GOALS.items():
            if row["launcher"] not in OURS or key not in row:
                continue
            for text, limit, value in (
                (f"{key}: ratio to torchrun", ratio, row[key]["ratio"]),
                (f"{key}: seconds beyond {least}", beyond, row[key].get("beyond_import_s")),
            ):
                if value is not None:
                    met = "" if value["noisy"] else "met" if value["median"] <= limit else "missed"
                    lines.append([f"{row['launcher']}, {text}", f"<= {limit}", show(value), met])
    return table(lines)


def check(rows: list[dict[str, Any]]) -> int:
    """Print our ratios; 1 when one is beyond the gate and not noise. CPU time hardly depends on what else runs."""
    code = 0
    for row in rows:
        for key in (*GOALS, "cpu") if row["launcher"] in OURS else ():
            ratio = row[key]["ratio"]
            print(f"{row['launcher']}, {key}: {show(ratio)} of {BASE} (must be <= {GATE})")
            if ratio["median"] > GATE and not ratio["noisy"]:
                code = 1
    return code


def main() -> int:
    """Measure, print, write; 1 when `--quick` finds a ratio that is far too high."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default 15; 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="only our launches against torchrun, for CI")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "launch.json")
    options = parser.parse_args()
    measure.adopt_orphans()
    launchers = []
    for launcher in LAUNCHERS:
        if options.quick and launcher.name not in (*OURS, BASE):
            continue
        if launcher.package and not measure.installed(launcher.package):
            print(f"{launcher.name} is left out: `make bench` installs it (.ci/setup dev bench)")
            continue
        launchers.append(launcher)
    rows = summarize(measure_all(launchers, options.rounds or (3 if options.quick else 15)))
    if options.quick:
        return check(rows)
    print(f"{report(rows)}\n\n{goals(rows)}")
    measure.write_results(options.output, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
