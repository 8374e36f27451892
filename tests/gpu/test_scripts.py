"""Scripts on a session on a real GPU, killed in their steps."""

from pathlib import Path

import pytest
from gpu_runs import ENVIRONMENT
from paths import ROOT
from ranks import events
from session_runs import train_struck
from states import difference, read_state

from trainer.records import read_lines

WORDS = {"digits_script": ("--epochs=2", "--batch-size=240"), "gan_script": ("--steps=12", "--batch-size=300")}


def logged(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What was logged of each step; what a later attempt did again counts."""
    of_attempt = ("time", "attempt", "kind", "step", "samples_per_s")
    return {
        (line["kind"], line["step"]): {key: value for key, value in line.items() if key not in of_attempt}
        for line in read_lines(run / "metrics.jsonl")
    }


@pytest.mark.parametrize("name", WORDS)
def test_killed_in_every_third_step_nothing_changes(tmp_path: Path, name: str) -> None:
    for folder, plan in (("calm", "exact"), ("run", "exact,kill:2/3")):
        train_struck(
            tmp_path / folder, plan, ROOT / f"jobs/{name}.py", WORDS[name], "device=cuda", "devices_per_node=1",
            "preload=[sklearn.datasets]", base=ENVIRONMENT,
        )  # fmt: skip
    run, calm = tmp_path / "run", tmp_path / "calm"
    assert len(list((run / "strikes").iterdir())) >= 4
    assert {event["folder"] for event in events(run, "resume")} == {"memory"}
    assert difference(read_state(calm), read_state(run)) == ""
    assert logged(run) == logged(calm)
