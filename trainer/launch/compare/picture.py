"""The plot of a comparison: `compare.png`."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(result: Mapping[str, Any], losses: Mapping[str, Sequence[float]], path: Path) -> str:
    """Draw speed, memory, bytes, and losses by samples and by time; return what was written, in words."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(15, 8), layout="constrained")
    except ImportError:
        return 'compare.json; no plot without matplotlib: pip install "muster-train[plot]"'
    (speeds, memory, traffic), (by_samples, by_time, words) = figure.subplots(2, 3)
    modes = list(result["modes"])
    for place, (mode, item) in enumerate(result["modes"].items()):
        speeds.bar(place, item["samples_per_s"])
        speeds.plot([place] * len(item["rounds"]), item["rounds"], "k.")
        _bars(memory, place, [device["peak_mb"] for device in item["peak_memory_mb"]])
        _bars(traffic, place, [count / 1024 for count in item["bytes_per_step"]])
        style = ("-", "--", ":")[place % 3]
        samples = [step * result["batch_size"] for step in range(1, 1 + len(losses[mode]))]
        by_samples.plot(samples, losses[mode], style, label=mode)
        by_time.plot(*zip(*item["curve"], strict=True), style, label=mode)
    for axes in (speeds, memory, traffic):
        axes.set_xticks(range(len(modes)), modes, rotation=30)
    speeds.set_title("samples/s (dots: rounds)")
    where = "memory per device" if result["device"] == "cuda" else "resident memory per process"
    memory.set_title(f"peak {where}, MiB")
    traffic.set_title("KiB per step and rank, sent and received by TCP")
    by_samples.set_title("loss by samples")
    by_samples.legend()
    by_time.set_title("loss by seconds")
    words.axis("off")
    refused = "\n".join(f"{mode}: refused" for mode in result["refused"])
    words.text(0, 1, refused, verticalalignment="top")
    figure.suptitle(f"{result['job']}: {result['devices']} {result['device']} devices, batch {result['batch_size']}")
    figure.savefig(path)
    return "compare.json, compare.png"


def _bars(axes: Any, place: int, values: Sequence[float]) -> None:
    """One for each rank or device, side by side."""
    width = 0.8 / max(1, len(values))
    for part, value in enumerate(values):
        axes.bar(place - 0.4 + (part + 0.5) * width, value, 0.9 * width, color=f"C{place}")
