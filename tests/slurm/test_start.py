"""How long a user waits from the command to the first step, beside what Slurm and PyTorch take by themselves."""

import statistics
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_starts import by_hand, by_muster

PAIRS = 2


@pytest.mark.speed
def test_the_first_step_comes_as_soon_as_with_bare_srun(
    slurm: Cluster, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes with two ranks each, in turn."""
    pairs = [(by_muster(slurm, shared_path), by_hand(slurm, shared_path)) for _ in range(PAIRS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    with capsys.disabled():
        times = ", ".join(f"{ours:.1f} s and {theirs:.1f} s" for ours, theirs in pairs)
        print(f"\nfrom the command to the first step, muster submit and bare sbatch: {times}; ratio {ratio:.2f}")
    assert ratio <= 1.15
