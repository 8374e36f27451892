"""The table that ends a run, from its run folder: for the terminal that followed it and for rank 0's log."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.records import read_json
from trainer.run.descriptions import count, duration, number
from trainer.run.folder import RunFolder, last_event
from trainer.run.goodput import goodput
from trainer.run.history import restarts_text, training_times
from trainer.run.progress import mean_speed


def plain_table(run: RunFolder) -> str:
    """The table as aligned lines; empty when the run has no result yet."""
    result = read_json(run.result)
    if result is None:
        return ""
    events = run.read_main_events()
    metrics = result["metrics"].items()
    memory = (f"rank {item['rank']} {item['device']} {item['peak_mb']:,.0f} MiB" for item in result["peak_memory_mb"])
    table = {name: number(value) for name, value in metrics} | {
        **_speed(run, result, training_times(events)),
        "mode": f"{result['parallel']}, {count(result['world_size'], 'rank')}, {result['device']}",
        "peak memory": "; ".join(memory),
        **({"restarts": text} if (text := restarts_text(events)) else {}),
        **({"goodput": str(share)} if (share := goodput(events)) else {}),
        "run folder": str(run),
    }
    width = max(map(len, table))
    return "\n".join(f"{name:{width}}  {value}" for name, value in table.items())


def _speed(run: RunFolder, result: dict[str, Any], times: Sequence[float]) -> dict[str, str]:
    """Samples per second, and the time of the training: over all attempts, and not of the last one alone."""
    speed, time, attempts = result["samples_per_s"], result["train_s"], ""
    if len(times) > 1:
        speed = mean_speed(run) or speed
        time, attempts = sum(times), f" in {len(times)} attempts"
    return {
        "samples/s": f"{speed:,.0f}",
        "time": f"{f'{time:.1f} s' if time < 100 else duration(time)} for {result['steps']} steps{attempts}",
    }


def separate_ranks(run: RunFolder) -> str:
    """What to know about a script whose ranks never met in its last launch; empty when they did."""
    event = last_event(run.read_main_events(), "separate_ranks", "attempt")
    if event is None or event["event"] == "attempt":
        return ""
    return (
        f"note: {event.get('ranks')} ranks ran the script, and none joined a process group with another "
        "(torch.distributed.init_process_group). Unless it divides the work by RANK itself, each did all of it"
    )


def resume_command(run: RunFolder) -> str:
    """The command that continues a run where it ran, as it can be pasted into the shell that started this process."""
    program, beside = "muster", Path(sys.prefix, "bin", "muster")
    if not shutil.which("muster") and beside.exists():
        program = str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
    words = [program, "run", str(run)]
    if not run.platform.exists() and not run.handle.exists():  # started by hand
        wired = last_event(run.read_main_events(), "wired")
        platform = str((wired or {}).get("platform", "local"))
        words += ["--on", platform] if platform not in ("alone", "local") else []
    return shlex.join(words)
