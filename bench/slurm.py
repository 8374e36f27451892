"""From the command to the first optimizer step on Slurm: two nodes with two ranks each, by turns.

`muster submit --on slurm` against a batch script that starts the same training, written by hand, with `srun python`.
The cluster is that of the tests (tests/support): real daemons on hosts of their own, on this machine.

    python bench/slurm.py [--rounds 7] [--output bench/results/slurm.json]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import measure
from measure import show, spread, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "slurm.json")
    options = parser.parse_args()
    import slurm_packages
    from slurm_cluster import Cluster
    from slurm_starts import by_hand, by_muster

    try:
        slurm_packages.ensure(install=False)
    except slurm_packages.Unavailable as reason:
        print(f"Slurm is left out: {reason}")
        return
    ways = {"srun python": by_hand, "muster submit": by_muster}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with Cluster(shared=[ROOT]) as cluster:
        os.environ["PATH"] = cluster.path
        for number in range(options.rounds + 1):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                folder = cluster.session / f"{number}-{name.replace(' ', '-')}"
                folder.mkdir()
                seconds = ways[name](cluster, folder)
                if number:  # the first round fills the machine's file cache
                    found[name].append(seconds)
            print(f"\rround {number} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    pairs = list(zip(found["muster submit"], found["srun python"], strict=True))
    rows = [
        {"launcher": name, "rounds": options.rounds, "step": {"s": spread(seconds)}} for name, seconds in found.items()
    ]
    rows[1]["step"]["ratio"] = spread([ours / theirs for ours, theirs in pairs])
    print(table([["command", "first step, s", "ratio to srun python"], *(
        [row["launcher"], show(row["step"]["s"]), show(row["step"].get("ratio"))] for row in rows
    )]))  # fmt: skip
    measure.write_results(options.output, rows=rows)


if __name__ == "__main__":
    main()
