"""Draws what the benches wrote: a picture beside each `bench/results/*.json`, for a README about 800 pixels wide.

Medians with their quartiles, in colour what a picture is about: ours, mostly. What measure.py calls noisy is hatched,
up to the most that any round had. Nothing is measured here.

    python bench/plots.py [FOLDER]
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
OURS, OTHERS, INK = "#2f6db3", "#b9bec4", "#333333"
WIDTH_IN, BAR_IN, TITLE_IN, DOTS_PER_IN = 8.0, 0.22, 0.4, 150


@dataclass(frozen=True)
class Bar:
    """A value as `measure.spread` gives it; `note` is said behind it."""

    label: str
    value: dict[str, Any]
    ours: bool
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Bars with one unit, which `format` writes."""

    title: str
    bars: list[Bar]
    format: str


@dataclass(frozen=True)
class Picture:
    """Of one bench; two panels side by side that have the same labels share them."""

    title: str
    panels: list[Panel]
    caption: str


def is_ours(name: str) -> bool:
    """Whether a row is one of Muster's."""
    return name.startswith(("muster", "python -m trainer"))


def rows_of(rows: Iterable[dict[str, Any]], name: str, key: str) -> list[Bar]:
    """A bar of each row: `name` is the key of its label, `key` that of its value."""
    return [Bar(row[name], row[key], is_ours(row[name])) for row in rows]


def in_percent(ratio: dict[str, Any]) -> dict[str, Any]:
    """What is beyond 1."""
    low, high = (100 * (value - 1) for value in ratio["quartiles"])
    median, largest = (100 * (ratio[key] - 1) for key in ("median", "largest"))
    return {"median": median, "quartiles": [low, high], "largest": largest, "noisy": ratio["noisy"]}


def computed(value: float) -> dict[str, Any]:
    """A value without noise."""
    return {"median": value, "quartiles": [value, value], "largest": value, "noisy": False}


def loop(data: dict[str, Any]) -> Picture:
    """What each loop adds to the steps of the one by hand; lean libraries below those as documented."""
    panels: dict[tuple[str, int], list[Bar]] = {}
    steps: dict[tuple[str, int], float] = {}
    for row in sorted(data["rows"], key=lambda row: row["lean"]):
        bars = panels.setdefault((row["size"], row["ranks"]), [])
        steps.setdefault((row["size"], row["ranks"]), row["raw_cpu_ms"])
        for name, ratio in row["ratio"].items():
            if not (row["lean"] and name in ("muster", "muster, session", "raw, DataLoader")):  # these know no lean way
                bars.append(Bar(f"{name}, lean" if row["lean"] else name, in_percent(ratio), is_ours(name)))
    for bars in panels.values():
        names = [bar.label for bar in bars]
        bars.sort(key=lambda bar: names.index(bar.label.removesuffix(", lean")))
    drawn = [
        Panel(f"{size}, {ranks} rank{'s' * (ranks > 1)}: {steps[size, ranks]:.2f} ms by hand", bars, "{:+.1f} %")
        for (size, ranks), bars in panels.items()
    ]
    caption = "CPU time beyond the loop by hand; lean: without what the library's documentation adds to the loop"
    return Picture("What a loop costs beside the same training by hand", drawn, caption)


def launch(data: dict[str, Any]) -> Picture:
    """Two moments of a start, in the order of the first."""
    rows = sorted((row for row in data["rows"] if "step" in row), key=lambda row: row["all-reduce"]["s"]["median"])
    moments = (("all-reduce", "first all-reduce"), ("step", "first optimizer step"))
    panels = [
        Panel(title, rows_of([{**row, "s": row[key]["s"]} for row in rows], "launcher", "s"), "{:.2f} s")
        for key, title in moments
    ]
    imports = [row for row in data["rows"] if row["launcher"] == "import torch"]
    least = "".join(f"; `import torch` alone takes {row['end']['s']['median']:.2f} s" for row in imports)
    return Picture("From the command to two ranks at work", panels, f"seconds{least}")


def checkpoint(data: dict[str, Any]) -> Picture:
    """The stall, by size of the state."""
    sizes = dict.fromkeys(row["megabytes"] for row in data["rows"])
    panels = [
        Panel(f"state of {size:,} MB", rows_of((r for r in data["rows"] if r["megabytes"] == size), "way", "stall_s"),
              "{:.2f} s")
        for size in sizes
    ]  # fmt: skip
    return Picture("How long a save holds the training up", panels, "seconds; a memory copy is the limit")


def recovery(data: dict[str, Any]) -> Picture:
    """With what the seconds do not show: how often it recovered at all."""
    bars = [
        Bar(row["runner"], row["s"], is_ours(row["runner"]),
            f"{row['recovered']} of {row['rounds']} recovered, {row['steps_lost']['median']:.0f} steps lost")
        for row in data["rows"] if row["s"]
    ]  # fmt: skip
    return Picture("From kill -9 of a rank to the next completed step", [Panel("", bars, "{:.2f} s")], "seconds")


def data_loading(data: dict[str, Any]) -> Picture:
    """Only ratios: the units differ."""
    rows = data["rows"]
    panels = [
        Panel(measure.removeprefix("1000 ").removesuffix(", µs"),
              [Bar(f"{row['dataset']}, {row['workers']} workers", in_percent(row["ratio"]), True)
               for row in rows if row["measure"] == measure], "{:+.0f} %")
        for measure in dict.fromkeys(row["measure"] for row in rows)
    ]  # fmt: skip
    caption = "difference to a DataLoader; more samples/s and shorter waits are better"
    return Picture("Loading data, beside torch's DataLoader", panels, caption)


def ddp(data: dict[str, Any]) -> Picture:
    """How near an all-reduce comes to what the same connection can carry."""
    bars = [
        Bar(f"{row['mib']} MiB, {name}", row[f"{key}_gb_per_s"], key == "gloo")
        for row in data["bandwidth"] for name, key in (("all-reduce", "gloo"), ("plain TCP", "tcp"))
    ]  # fmt: skip
    buckets = rows_of([{**row, "buckets": f"buckets: {row['buckets']}"} for row in data["buckets"]], "buckets", "s")
    panels = [Panel("bus bandwidth, 2 ranks", bars, "{:.2f} GB/s"), Panel("a step of DDP", buckets, "{:.3f} s")]
    caption = "in grey: as many bytes over one TCP connection of the same two processes"
    return Picture("DistributedDataParallel on gloo, over the loopback", panels, caption)


def scale(data: dict[str, Any]) -> Picture:
    """The model beside the measurement, and what it says of many nodes."""
    panels = []
    for title, prefix in (("CPU time of a rank in a step of DDP", "cpu_"), ("wall time, while nothing else ran", "")):
        bars = [
            Bar(f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}, {what}", row[key], what == "predicted")
            for row in data["rows"] for what in ("measured", "predicted") if (key := f"{prefix}{what}_ms") in row
        ]  # fmt: skip
        panels += [Panel(title, bars, "{:.0f} ms")] if bars else []
    nodes = [
        Bar(f"{row['nodes']} node{'s' * (row['nodes'] > 1)}", computed(100 * row["goodput"]["exposed"]), True)
        for row in data["nodes"]
    ]
    given = data["given"]
    caption = (
        f"goodput: of N nodes that lose nothing; no overlap, {given['bandwidth_gbit']:g} Gbit/s, "
        f"{given['latency_us']:g} µs, {given['failures_per_1000_node_days']:g} failures per 1,000 node-days"
    )
    panels.append(Panel("predicted goodput", nodes, "{:.1f} %"))
    return Picture("A step of DDP, predicted from its parts", panels, caption)


def gpu(data: dict[str, Any]) -> Picture:
    """Our speed beside that of the loop by hand."""
    bars = [
        Bar(f"{row['configuration']}{name}", row[key], not name)
        for row in data["speed"] for name, key in (("", "kilotokens_per_s"), (", by hand", "raw_kilotokens_per_s"))
    ]  # fmt: skip
    return Picture("A language model on one GPU", [Panel("", bars, "{:.1f}")], f"1,000 tokens/s, {data['device']}")


PICTURES: dict[str, Callable[[dict[str, Any]], Picture]] = {
    "loop": loop, "launch": launch, "checkpoint": checkpoint, "recovery": recovery, "data": data_loading, "ddp": ddp,
    "scale": scale, "gpu": gpu,
}  # fmt: skip


def draw_bars(axes: Any, panel: Panel, places: int) -> list[tuple[float, Any]]:
    """From top to bottom, with the value behind each; returns these texts and where they start."""
    texts = []
    for place, bar in enumerate(panel.bars):
        value, color = bar.value, OURS if bar.ours else OTHERS
        low, high = value["quartiles"]
        if value["noisy"]:
            end, text = value["largest"], f"noise too high (all ≤ {panel.format.format(value['largest'])})"
            axes.barh(place, end, 0.7, color="white", edgecolor=color, hatch="/////", linewidth=0.8)
        else:
            end, text = high, panel.format.format(value["median"])
            axes.barh(place, value["median"], 0.7, color=color)
            if high > low:
                axes.plot([low, high], [place, place], color=INK, linewidth=1, marker="|", markersize=5)
        text = f"{text}, {bar.note}" if bar.note else text
        behind = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
        texts.append((max(end, 0), axes.annotate(text, (max(end, 0), place), in_layout=False, **behind)))
    axes.axvline(0, color=OTHERS, linewidth=0.8)
    axes.set_ylim(places - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=9, loc="left", color=INK)
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=8.5)
    axes.tick_params(length=0)
    for label, bar in zip(axes.get_yticklabels(), panel.bars, strict=True):
        label.set_color(OURS if bar.ours else INK)
    axes.set_xticks([])
    axes.set_frame_on(False)
    return texts


def draw(picture: Picture, machine: dict[str, Any], path: Path) -> None:
    """Two panels a row."""
    rows = [picture.panels[first : first + 2] for first in range(0, len(picture.panels), 2)]
    heights = [TITLE_IN + BAR_IN * max(len(panel.bars) for panel in row) for row in rows]
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(WIDTH_IN, sum(heights) + 0.75), dpi=DOTS_PER_IN, layout="constrained", facecolor="white"
    )
    figure.suptitle(picture.title, fontsize=11, x=0.01, ha="left", color=INK)
    facts = f"{machine['cpus']} CPUs, torch {machine['versions']['torch']}, load {machine['load'][0]:.1f} at the end"
    figure.supxlabel(f"{picture.caption}\n{facts}; whiskers: quartiles", fontsize=7.5, x=0.01, ha="left", color=INK)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    drawn = []
    for part, panels in zip(parts, rows, strict=True):
        places = max(len(panel.bars) for panel in panels)
        labels = [[bar.label for bar in panel.bars] for panel in panels]
        for position, axes in enumerate(part.subplots(1, len(panels), squeeze=False)[0]):
            drawn.append((axes, draw_bars(axes, panels[position], places)))
            if position and labels[position] == labels[0]:
                axes.set_yticks([])
    figure.draw_without_rendering()
    for axes, texts in drawn:  # room for each text behind its bar
        width, least = axes.get_window_extent().width, min(axes.get_xlim()[0], 0)
        shares = [max(0.1, 1 - (text.get_window_extent().width + 24) / width) for _, text in texts]
        axes.set_xlim(least, max(least + (end - least) / share for share, (end, _) in zip(shares, texts, strict=True)))
    figure.savefig(path)


def main() -> None:
    """Draw what is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        print("no plots: matplotlib is not installed (it is in the extra `bench`: make setup-bench)")
        return
    for name, picture in PICTURES.items():
        source = folder / f"{name}.json"
        if not source.exists():
            continue
        data = json.loads(source.read_text())
        try:
            draw(picture(data), data["machine"], source.with_suffix(".png"))
        except (KeyError, TypeError):
            print(f"{source}: written by another version of bench/{name}.py; run it again")
            continue
        print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
