"""A comparison as text that fits a terminal of 80 columns: two tables and some sentences."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.launch.compare.verdict import FIRST_STEPS, OTHER_TRAINING

WIDTH = 79
EQUAL = "Losses: equal step by step within rounding, which grows with the steps"
APART = "Losses: equal at first, apart later; train.precision=float64 tells rounding from a difference"
DIFFERENT = (
    "Losses: not those of single. Dropout, batch statistics per device and options of ddp can explain that; "
    "without these something in the task depends on how a batch is divided"
)


def text(result: Mapping[str, Any]) -> str:
    """All of it."""
    title = (
        f"{result['job']} on {result['devices']} {result['device']} devices, batch {result['batch_size']}: medians "
        f"of {result['rounds']} round(s), in turn; {result['steps']} steps, after {result['warm_up_steps']} to warm up"
    )
    paragraphs = [
        title, _speeds(result), _traffic(result), *(f"{mode}: {why}" for mode, why in result["refused"].items()),
        _communication(result["communication"]), _losses(result["losses"]), result["verdict"], result["limits"],
    ]  # fmt: skip
    return "\n\n".join(part if "\n" in part else fill(part) for part in paragraphs if part)


def fill(paragraph: str) -> str:
    """Its lines."""
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def _speeds(result: Mapping[str, Any]) -> str:
    lines = [f"{'mode':14}{'samples/s':>10}{'rounds':>17}{'speed-up':>10}{'efficiency':>11}{'memory, MiB':>13}"]
    for mode, item in result["modes"].items():
        rounds = f"{min(item['rounds']):,.0f} - {max(item['rounds']):,.0f}"
        peaks = sorted({round(peak["peak_mb"]) for peak in item["peak_memory_mb"]})
        memory = " - ".join(f"{peak:,}" for peak in (peaks if len(peaks) < 3 else (peaks[0], peaks[-1])))
        ratios = f"{item['speed_up']:9.2f}x{item['efficiency']:11.0%}"
        lines.append(f"{mode:14}{item['samples_per_s']:10,.0f}{rounds:>17}{ratios}{memory:>13}")
    return "\n".join(lines)


def _traffic(result: Mapping[str, Any]) -> str:
    """Bytes of each rank and of the busiest, and what was learned from equal samples and in equal time."""
    lines = [
        f"{'':14}{'KiB per step by TCP':^26}{'mean loss at the end of':^36}".rstrip(),
        f"{'mode':14}{'a rank':>12}{'busiest':>12}{result['samples']:>14,} samples{result['seconds']:>12.1f} s",
    ]
    for mode, item in result["modes"].items():
        bytes_ = item["bytes_per_step"] if len(item["bytes_per_step"]) > 1 else []
        mean, most = (sum(bytes_) / len(bytes_), max(bytes_)) if bytes_ else (0, 0)
        shown = [f"{value / 1024:,.0f}" if bytes_ else "-" for value in (mean, most)]
        losses = f"{item['loss_after_samples']:>22.4f}{item['loss_after_seconds']:>14.4f}"
        lines.append(f"{mode:14}{shown[0]:>12}{shown[1]:>12}{losses}")
    return "\n".join(lines)


def _communication(costs: Mapping[str, Any]) -> str:
    share = costs["reason"] if costs["share"] is None else f"{costs['share']:.0%} of a step"
    if "step_ms" in costs:
        share += f" ({costs['step_ms']:.2f} ms against {costs['step_without_ms']:.2f} ms)"
    return f"Communication in ddp: {share}; {costs['method']}."


def _losses(losses: Mapping[str, Any]) -> str:
    pairs: Sequence[tuple[str, float]] = list(losses["all_steps"].items())
    words = [f"{mode} {losses['first_steps'][mode]:.0e}, {whole:.0e}" for mode, whole in pairs]
    form = EQUAL if losses["equal"] else APART if losses["starts_equal"] else DIFFERENT
    where = f"in the first {FIRST_STEPS} steps, and in all {losses['steps']}"
    others = f"{' and '.join(OTHER_TRAINING)} train differently, so their losses differ."
    return f"{form}. Largest relative difference from single {where}: {'; '.join(words)}. {others}"
