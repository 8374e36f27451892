"""What the numbers of `muster compare` mean: speed-up, efficiency, communication, equal losses, and which mode to use.

The numbers come from `trainer.launch.compare.runs`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MODES = ("single", "dp", "ddp")
LEAST_ROUNDS = 3
"""With fewer, one mode is too often ahead in every round by chance."""
FIRST_STEPS = 10
TOLERANCES = {"float64": (1e-12, 1e-8), "float32": (1e-4, 1e-2), "bf16": (2e-2, 1e-1), "fp16": (2e-2, 1e-1)}
"""Largest relative difference of equal losses: in the first steps, where a mode that computes something else shows
at once, and in all steps, because rounding errors grow from step to step."""
EQUAL = "losses: equal step by step within rounding, which grows with the steps; {}"
APART = "losses: equal at first, apart later ({}): train.precision=float64 tells rounding from a difference"
DIFFERENT = (
    "losses: not those of single ({}). That is no error with dropout, batch statistics per device, or options of ddp; "
    "without these something in the task depends on how a batch is divided"
)
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
    """Whether all modes have single's losses, and the largest relative differences of `dp` and `ddp`."""
    single, (near, far) = losses["single"], TOLERANCES[precision]
    others = [mode for mode in losses if mode != "single"]
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
    middle = {mode: statistics.median(values) for mode, values in speeds.items()}
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
        slower = [f" Only {mode} is clearly slower." for mode in others if mode not in rivals]
        text = f"Noise too high for a winner: {' and '.join(leads)}, but rounds of one mode differ by up to "
        text += f"{noise:.0%}.{''.join(slower)} Repeat on a quiet machine, or with larger --rounds or --steps."
        return {"winner": None, "verdict": text}
    if best == "single":
        text = f"Use single: {devices} devices are slower than one here (dp {1 / ratio['dp']:.2f}x, "
        text += f"ddp {1 / ratio['ddp']:.2f}x its speed), so they do not pay at a global batch of {batch_size}."
    else:
        other = "dp" if best == "ddp" else "ddp"
        text = f"Use {best}: {ratio['single']:.2f}x the speed of single on {devices} devices "
        text += f"(efficiency {ratio['single'] / devices:.0%}), {ratio[other]:.2f}x that of {other}."
    if best == "dp":
        text += " It cannot go beyond one node, and its primary device needs the most memory."
    elif share is not None and share >= 0.1:
        text += f" {share:.0%} of a ddp step is communication: a larger train.batch_size or train.accumulate lowers it."
    return {"winner": best, "verdict": text}


def summarize(
    facts: Mapping[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]], without: Sequence[float],
    refused: str, losses: Mapping[str, Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """All that is known, as `compare.json` holds it.

    `timed`: of each mode, what its rounds measured; `without`: samples/s of DDP without synchronisation, empty for the
    reason `refused`.
    """
    speeds = {mode: [float(item["speed"]) for item in timed[mode]] for mode in MODES}
    single = statistics.median(speeds["single"])
    modes = {}
    for mode in MODES:
        middle, count = statistics.median(speeds[mode]), 1 if mode == "single" else facts["devices"]
        modes[mode] = {
            "samples_per_s": middle, "rounds": speeds[mode], "spread": spread(speeds[mode]),
            "speed_up": middle / single, "efficiency": middle / single / count,
            "peak_memory_mb": peak_memory([item["memory"] for item in timed[mode]]),
        }  # fmt: skip
    shared = communication(speeds["ddp"], without, facts["batch_size"], refused)
    return {
        **facts, "modes": modes, "communication": shared, "losses": compare_losses(losses, facts["precision"]),
        **choose(speeds, facts["devices"], facts["batch_size"], shared["share"]),
        "limits": ON_CPU.format(**facts) if facts["device"] == "cpu" else "",
    }  # fmt: skip


def peak_memory(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The largest peak, MiB, of each rank's device over all rounds."""
    ranks = zip(*rounds, strict=True)
    return [{**items[0], "peak_mb": max(item["peak_mb"] for item in items)} for items in ranks]


def text(result: Mapping[str, Any]) -> str:
    """The comparison as a table and sentences."""
    lines = [
        f"{result['job']} on {result['devices']} {result['device']} devices, batch {result['batch_size']}: medians of "
        f"{result['rounds']} rounds, modes in turn; {result['steps']} steps after {result['warm_up_steps']} of warm-up",
        "",
        f"{'mode':8}{'samples/s':>10}{'rounds':>18}{'speed-up':>10}{'efficiency':>12}  peak memory, MiB",
    ]
    for mode, item in result["modes"].items():
        rounds = f"{min(item['rounds']):,.0f} - {max(item['rounds']):,.0f}"
        peaks = item["peak_memory_mb"]
        names = [f"rank {peak['rank']}" if peak["device"] == "cpu" else peak["device"] for peak in peaks]
        memory = ", ".join(f"{name} {peak['peak_mb']:,.0f}" for name, peak in zip(names, peaks, strict=True))
        ratios = f"{item['speed_up']:9.2f}x{item['efficiency']:12.0%}"
        lines.append(f"{mode:8}{item['samples_per_s']:10,.0f}{rounds:>18}{ratios}  {memory}")
    costs = result["communication"]
    share = costs["reason"] if costs["share"] is None else f"{costs['share']:.0%} of a step"
    if "step_ms" in costs:
        share += f" ({costs['step_ms']:.2f} ms against {costs['step_without_ms']:.2f} ms)"
    losses = result["losses"]
    words = [f"{mode} {losses['first_steps'][mode]:.1e}, {whole:.1e}" for mode, whole in losses["all_steps"].items()]
    form = EQUAL if losses["equal"] else APART if losses["starts_equal"] else DIFFERENT
    where = f"in the first {FIRST_STEPS} steps, in all {losses['steps']}"
    difference = form.format(f"largest relative difference from single {where}: {'; '.join(words)}")
    lines += ["", f"communication in ddp: {share}; {costs['method']}", difference, "", result["verdict"]]
    return "\n".join([*lines, *filter(None, [result["limits"]])])
