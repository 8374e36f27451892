"""The table that ends a run, from its run folder: for the terminal that followed it and for rank 0's log."""

import shlex
import shutil
import sys
from pathlib import Path

from trainer.records import read_json
from trainer.run.folder import RunFolder, last_event


def plain_table(run: RunFolder) -> str:
    """The table as aligned lines; empty when the run has no result yet."""
    result = read_json(run.result)
    if result is None:
        return ""
    metrics = result["metrics"].items()
    memory = (f"rank {item['rank']} {item['device']} {item['peak_mb']:,.0f} MiB" for item in result["peak_memory_mb"])
    table = {name: f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}" for name, value in metrics} | {
        "samples/s": f"{result['samples_per_s']:,.0f}",
        "time": f"{result['train_s']:.1f} s for {result['steps']} steps",
        "mode": f"{result['parallel']}, {result['world_size']} rank(s), {result['device']}",
        "peak memory": "; ".join(memory),
        "run folder": str(run),
        "continue with": resume_command(run),
    }
    width = max(map(len, table))
    return "\n".join(f"{name:{width}}  {value}" for name, value in table.items())


def resume_command(run: RunFolder) -> str:
    """The command that continues a run where it ran, as it can be pasted into the shell that started this process."""
    program, beside = "muster", Path(sys.prefix, "bin", "muster")
    if not shutil.which("muster") and beside.exists():
        program = str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
    words = [program, "run", str(run)]
    if not run.platform.exists() and not run.handle.exists():  # started by hand
        wired = last_event(run.read_events(), "wired")
        words += ["--on", wired["platform"]] if wired and wired["platform"] not in ("alone", "local") else []
    return shlex.join(words)
