"""The table that ends a run, from its run folder: for the terminal that followed it and for rank 0's log."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from trainer.records import read_json, read_lines


def rows(run: Path) -> list[tuple[str, str]]:
    """Names and values to show; empty when the run has no result yet."""
    result = read_json(run / "result.json")
    if result is None:
        return []
    table = [(name, _number(value)) for name, value in result["metrics"].items()]
    table += [
        ("samples/s", f"{result['samples_per_s']:,.0f}"),
        ("time", f"{result['train_s']:.1f} s for {result['steps']} steps"),
        ("mode", f"{result['parallel']}, {result['world_size']} rank(s), {result['device']}"),
        ("peak memory", "; ".join(_memory(item) for item in result["peak_memory_mb"])),
        ("run folder", str(run)),
        ("continue with", resume_command(run)),
    ]
    return table


def resume_command(run: Path) -> str:
    """The command that continues a run where it ran, as it can be pasted into the shell that started this process."""
    beside = Path(sys.prefix, "bin", "muster")
    program = "muster" if shutil.which("muster") or not beside.exists() else str(beside)
    if program != "muster" and beside.is_relative_to(Path.cwd()):
        program = str(beside.relative_to(Path.cwd()))
    words = [program, "run", str(run)]
    if not (run / "plan" / "platform.json").exists() and not (run / "handle.json").exists():  # started by hand
        wired = [event["platform"] for event in read_lines(run / "events.jsonl") if event["event"] == "wired"]
        words += ["--on", wired[-1]] if wired and wired[-1] not in ("alone", "local") else []
    return shlex.join(words)


def plain_table(run: Path) -> str:
    """The table as aligned lines."""
    table = rows(run)
    width = max((len(name) for name, _ in table), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in table)


def _memory(item: dict[str, Any]) -> str:
    return f"rank {item['rank']} {item['device']} {item['peak_mb']:,.0f} MiB"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
