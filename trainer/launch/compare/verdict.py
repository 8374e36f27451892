"""What the numbers of `muster compare` mean: speed-up, efficiency, communication, equal losses, and which mode to use.

The numbers come from `trainer.launch.compare.runs`, and are shown by `trainer.launch.compare.table`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MODES = ("single", "dp", "ddp", "fsdp", "pipeline", "server", "local sgd", "server, async")
OTHER_TRAINING = ("local sgd", "server, async")
"""These have losses of their own, by design."""
NO_SYNC = "ddp without synchronisation"
LEAST_ROUNDS = 3
"""With fewer, one mode is too often ahead in every round by chance."""
FIRST_STEPS = 10
TOLERANCES = {"float64": (1e-12, 1e-8), "float32": (1e-4, 1e-2), "bf16": (2e-2, 1e-1), "fp16": (2e-2, 1e-1)}
"""Largest relative difference of equal losses: in the first steps, where a mode that computes something else shows
at once, and in all steps, because rounding errors grow from step to step."""
ON_CPU = (
    "On CPU every mode shares the same {processors} cores, and single uses all of them already: speed-up and "
    "efficiency are not those of added devices, and other work here slows its threads most. Nor can these numbers show "
    "memory per device (listed: resident memory per process), NCCL, DataParallel's imbalance (threads stand in for its "
    "replicas) or kernel launches."
)
METHOD = "what averaging gradients, and waiting for each other, adds to a step: ddp against ddp under no_sync"


def span(speeds: Sequence[float]) -> tuple[float, float]:
    """What the rounds of a mode cover: from the slowest to the fastest; from five rounds on, between the quartiles."""
    if len(speeds) < 5:
        return min(speeds), max(speeds)
    low, _, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return low, high


def spread(speeds: Sequence[float]) -> float:
    """The width of `span`, as a share of the median."""
    low, high = span(speeds)
    return (high - low) / statistics.median(speeds)


def is_faster(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the difference is larger than the noise: the spans do not meet, and the medians lie further apart."""
    apart = statistics.median(some) / statistics.median(others) - 1
    return span(some)[0] > span(others)[1] and apart > max(spread(some), spread(others))


def largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of two series of losses, step by step."""
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(some, others, strict=True))


def compare_losses(losses: Mapping[str, Sequence[float]], precision: str) -> dict[str, Any]:
    """Whether all modes that should have single's losses, and the largest relative differences of each."""
    single, (near, far) = losses["single"], TOLERANCES[precision]
    others = [mode for mode in losses if mode not in ("single", *OTHER_TRAINING)]
    first = {mode: largest_difference(single[:FIRST_STEPS], losses[mode][:FIRST_STEPS]) for mode in others}
    whole = {mode: largest_difference(single, losses[mode]) for mode in others}
    starts = max(first.values()) <= near
    return {
        "equal": starts and max(whole.values()) <= far, "starts_equal": starts, "steps": len(single),
        "first_steps": first, "all_steps": whole,
    }  # fmt: skip


def communication(ddp: Sequence[float], without: Sequence[float], batch_size: int, refused: str) -> dict[str, Any]:
    """The share of a DDP step that synchronisation costs, from samples/s with and without it.

    `share` is None when it cannot be told; `reason` says why. Times are milliseconds per step.
    """
    if not without:
        return {"share": None, "reason": f"not measured: {refused}", "method": METHOD}
    with_sync, alone = statistics.median(ddp), statistics.median(without)
    known = len(ddp) >= LEAST_ROUNDS and is_faster(without, ddp)
    return {
        "share": 1 - with_sync / alone if known else None, "reason": "" if known else "hidden by noise",
        "method": METHOD, "step_ms": 1000 * batch_size / with_sync, "step_without_ms": 1000 * batch_size / alone,
    }  # fmt: skip


def choose(speeds: Mapping[str, Sequence[float]], devices: int, batch_size: int, share: float | None) -> dict[str, Any]:
    """The `winner`, None when noise hides it, and the `verdict` in a sentence or two.

    `speeds`: samples/s of each mode's rounds; `share`: of communication in a DDP step, when known.
    """
    middle = {mode: statistics.median(values) for mode, values in speeds.items() if mode not in OTHER_TRAINING}
    rounds = min(map(len, speeds.values()))
    if rounds < LEAST_ROUNDS:
        text = f"{rounds} round(s) cannot tell noise from a difference: use --rounds {LEAST_ROUNDS} or more."
        return {"winner": None, "verdict": text}
    best, *others = sorted(middle, key=lambda mode: middle[mode], reverse=True)
    rivals = [mode for mode in others if not is_faster(speeds[best], speeds[mode])]
    ratio = {mode: middle[best] / middle[mode] for mode in others}
    if rivals:
        noise = max(spread(speeds[mode]) for mode in (best, *rivals))
        leads = [f"{best} is {ratio[mode] - 1:.0%} faster than {mode}" for mode in rivals]
        slower = [mode for mode in others if mode not in rivals]
        text = f"Noise too high for a winner: {' and '.join(leads)}, but rounds of one mode differ by up to "
        text += f"{noise:.0%}." + (f" Clearly slower: {', '.join(slower)}." if slower else "")
        return {"winner": None, "verdict": f"{text} Repeat on a quiet machine, or with larger --rounds or --steps."}
    speeds_of_others = ", ".join(f"{mode} {1 / ratio[mode]:.2f}x" for mode in others)
    if best == "single":
        text = f"Use single: {devices} devices are slower than one here ({speeds_of_others} its speed), so they do not "
        text += f"pay at a global batch of {batch_size}."
    else:
        text = f"Use {best}: {ratio['single']:.2f}x the speed of single on {devices} devices "
        text += f"(efficiency {ratio['single'] / devices:.0%}). The others, compared with it: {speeds_of_others}."
    if best == "dp":
        text += " It cannot go beyond one node, and its primary device needs the most memory."
    elif share is not None and share >= 0.1:
        text += f" {share:.0%} of a ddp step is communication: a larger train.batch_size or train.accumulate lowers it."
    return {"winner": best, "verdict": text}


def summarize(
    facts: Mapping[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]], without: Sequence[float],
    refused: Mapping[str, str], losses: Mapping[str, Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """All that is known, as `compare.json` holds it.

    `timed`: of each mode, what its rounds measured; `without`: samples/s of DDP without synchronisation, empty for a
    reason that is among those of `refused` modes.
    """
    speeds = {mode: [float(item["speed"]) for item in timed[mode]] for mode in MODES if mode in timed}
    single = statistics.median(speeds["single"])
    curves = {mode: timed[mode][-1]["curve"] for mode in speeds}
    seconds = min(curve[-1][0] for curve in curves.values())
    modes = {}
    for mode in speeds:
        middle, count = statistics.median(speeds[mode]), 1 if mode == "single" else facts["devices"]
        modes[mode] = {
            "samples_per_s": middle, "rounds": speeds[mode], "spread": spread(speeds[mode]),
            "speed_up": middle / single, "efficiency": middle / single / count,
            "peak_memory_mb": peak_memory([item["memory"] for item in timed[mode]]),
            "bytes_per_step": bytes_per_step(timed[mode][-1]["traffic"]),
            "loss_after_samples": mean_of_end([(1.0, loss) for loss in losses[mode]], 1.0),
            "loss_after_seconds": mean_of_end(curves[mode], seconds), "curve": curves[mode],
        }  # fmt: skip
    others = {mode: reason for mode, reason in refused.items() if mode in MODES}
    shared = communication(speeds["ddp"], without, facts["batch_size"], refused.get(NO_SYNC, ""))
    return {
        **facts, "modes": modes, "refused": others, "communication": shared, "seconds": seconds,
        "samples": len(losses["single"]) * facts["batch_size"],
        "losses": compare_losses(losses, facts["precision"]),
        **choose(speeds, facts["devices"], facts["batch_size"], shared["share"]),
        "limits": ON_CPU.format(**facts) if facts["device"] == "cpu" else "",
    }  # fmt: skip


def bytes_per_step(traffic: Sequence[Mapping[str, Any]]) -> list[int]:
    """What each rank sends and receives by TCP in a step."""
    return [round((line["sent"] + line["received"]) / line["steps"]) for line in traffic]


def mean_of_end(curve: Sequence[tuple[float, float]], end: float) -> float:
    """The mean loss of the last tenth of a curve of (time, loss) that is cut at a time."""
    before = [loss for time, loss in curve if time <= end] or [curve[0][1]]
    return statistics.mean(before[-max(1, len(before) // 10) :])


def peak_memory(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The largest peak, MiB, of each rank's device over all rounds."""
    ranks = zip(*rounds, strict=True)
    return [{**items[0], "peak_mb": max(item["peak_mb"] for item in items)} for items in ranks]
