"""README.md and docs/ are true: each command is typed on its page's own, each example of code is run.

Commands that need Slurm, an engine or a cluster are run by those tiers; here they are rendered.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
import torch
from documents import PAGES, SHORT, Block
from muster_runs import Run, end_all, hear_interrupts, stat, wait_for
from states import read_state

from trainer.config.load import merge_job, to_job

pytestmark = pytest.mark.timeout(600)


class Shell:
    """A terminal in a copy of the project."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.environment = documents.variables(project)
        self.typed: set[str] = set()

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command; what the page leaves to the reader (RUN, `digits-...`) is filled in."""
        command = re.sub(r"\bRUN\b", lambda _: str(self.newest().folder), command)
        command = re.sub(r"runs/(\w+)-\.\.\.", lambda found: str(self.newest(found[1]).folder), command)
        script = self.project.parent / "typed.sh"  # so that no command line is found that is not a run's
        script.write_text(command + "\n")
        return subprocess.Popen(
            ["bash", script], cwd=self.project, env=self.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=hear_interrupts, start_new_session=True,
        )  # fmt: skip

    def type(self, command: str) -> str:
        """Run a command to its end."""
        process = self.start(command)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, f"{command}\n{output[-3000:]}"
        return output

    def newest(self, name: str = "*") -> Run:
        """The run that was made last, of one name."""
        found = [path.parent for path in self.project.glob(f"runs/{name}-*/job.yaml")]
        return Run(max(found, key=lambda path: path.stat().st_mtime))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A terminal whose runs are ended at the end."""
    shell = Shell(documents.copy_project(tmp_path_factory.mktemp("reader") / "muster"))
    yield shell
    end_all(Run(shell.project / "runs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_does_what_the_page_says(shell: Shell, page: Path) -> None:
    for block in documents.blocks(page):
        if any(command.startswith("kill ") for command in block.commands):
            kill_a_rank(shell, block)
            continue
        for command in block.commands:
            if documents.tier(command) == "cli":
                follow_the_page(shell, block, command)
            elif (other := documents.rendered(command)) is not None:
                assert shell.type(other).strip()


def follow_the_page(shell: Shell, block: Block, command: str) -> None:
    """Run one command, in the state that those before it have left; one that two pages have is run once."""
    if command in shell.typed:
        return
    shell.typed.add(command)
    if command.startswith("muster submit") and "muster cancel RUN" in block.commands:
        shell.type(documents.shortened(command, "device=cpu", "train.epochs=1000"))  # until it is cancelled
        shell.newest().wait("first_step")
    elif command == "muster preempt RUN":
        shell.type(command)
        shell.newest().wait("training", 2)
    elif command == "muster cancel RUN":
        shell.type(command)
        run = shell.newest()
        wait_for("the end", (run.folder / "exit.json").exists)
        assert run.status()["state"] == "cancelled" and run.events("checkpoint")
    elif command == "muster run RUN":
        steps = shell.newest().status()["step"] + 5
        assert f"to {steps}" in shell.type(documents.shortened(command, "train.epochs=null", f"train.steps={steps}"))
    elif command.startswith("muster logs") and command.endswith("-f"):
        process = shell.start(command)
        assert process.stdout is not None and process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        shell.type(documents.shortened(command, *SHORT))


def kill_a_rank(shell: Shell, block: Block) -> None:
    """Two terminals: a training, and a kill in the middle of it. No other run of this machine may be hit."""
    train, stop = block.commands
    training = shell.start(documents.shortened(train, "device=cpu"))
    try:
        assert training.stdout is not None
        run = Run(Path(training.stdout.readline().removeprefix("run folder: ").strip()))
        run.wait("first_step")
        run.wait("checkpoint")
        before = set(run.ranks().values())
        (fork_server,) = {stat(pid)[1] for pid in before}
        shell.type(stop.replace("pgrep", f"pgrep --parent {fork_server}"))
        resume = run.wait("resume")
        assert resume["folder"] == "memory" and resume["step"] > 0
        run.wait("ranks", 2)
        assert before.isdisjoint(run.ranks().values())
    finally:
        os.killpg(training.pid, signal.SIGKILL)
        training.wait()
        end_all(run)


def test_a_checkpoint_is_plain_pytorch(shell: Shell) -> None:
    (program,) = documents.code(documents.ROOT / "README.md", "python")
    if (command := "muster run jobs/digits.yaml") not in shell.typed:
        shell.type(documents.shortened(command, *SHORT))
    run = shell.newest("digits-[0-9]*").folder
    names: dict[str, Any] = {}
    exec(re.sub(r"runs/digits-\.\.\./checkpoints/[^/]+", str(newest_checkpoint(run)), program), names)
    loaded, saved = names["model"].state_dict(), read_state(run)["model"]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_a_metric_that_is_not_a_mean_and_data_that_is_fetched(shell: Shell) -> None:
    programs = documents.code(documents.ROOT / "docs/your-model.md", "python")
    scored, fetched = (next(text for text in programs if name in text) for name in ("class Scored", "class Fetched"))
    tutorial = shell.project / "docs/tutorial"
    fetched = fetched.replace("https://example.org/cells.csv", (tutorial / "tumours.yaml").as_uri())
    (tutorial / "scored.py").write_text(f"{scored}\n{fetched}\nclass Both(Scored, Fetched):\n    pass\n")
    text = (tutorial / "tumours.yaml").read_text().replace("tumours:Tumours", "scored:Both")
    (tutorial / "scored.yaml").write_text(text)
    shell.type("muster run docs/tutorial/scored.yaml device=cpu train.epochs=3")
    assert 0.9 < shell.newest("scored").status()["metrics"]["f1"] <= 1
    assert [path.name for path in (shell.project / "data").iterdir()] == ["cells.csv"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_job_files_are_valid(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(documents.ROOT)
    for text in documents.code(page, "yaml"):
        (tmp_path / "page.yaml").write_text(textwrap.dedent(text))
        to_job(merge_job(tmp_path / "page.yaml", []))


def test_the_script_of_the_page_is_the_one_that_is_linked() -> None:
    text, *_ = documents.code(documents.ROOT / "docs/your-script.md", "yaml")
    assert text in (documents.ROOT / "docs/tutorial/line.yaml").read_text()


def test_ten_lines_make_a_script_go_on() -> None:
    """The page shows how the session's script differs from the plain one."""
    plain, session = ((documents.ROOT / path).read_text().splitlines() for path in documents.SCRIPTS)
    shown = [*difflib.unified_diff(plain, session, *documents.SCRIPTS, n=1, lineterm="")]
    assert documents.code(documents.ROOT / "docs/your-script.md", "diff") == ["\n".join([*shown, ""])]
    assert len([line for line in shown if re.match(r"\+[^+\n]", line)]) <= 10 and len(session) <= 60
