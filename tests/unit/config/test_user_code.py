"""Where user code is imported from, and what is refused because its name is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainer.config.load import merge_job, to_job
from trainer.config.name_clash import find_clash
from trainer.config.user_code import check_script, import_paths
from trainer.errors import JobError
from trainer.run.folder import RunFolder

TASK = "import lightning_like\nfrom muster import Task\nclass Mine(Task): pass\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with code in `src` and in `lib`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, text in (("src/cells/task.py", TASK), ("src/cells/__init__.py", ""), ("lib/other.py", TASK)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    return tmp_path


def test_src_and_python_path_are_looked_into(project: Path) -> None:
    Path("jobs").mkdir()
    job = project / "jobs/cells.yaml"
    job.write_text("task: cells.task:Mine\n")
    assert to_job(merge_job(job)).task == "cells.task:Mine"
    assert import_paths(job) == [project, project / "jobs", project / "src"]
    job.write_text("task: other:Mine\n")
    with pytest.raises(JobError, match="no module other"):
        to_job(merge_job(job))
    job.write_text("task: other:Mine\npython_path: [./lib, ~/mine]\n")
    paths = to_job(merge_job(job)).python_path
    assert import_paths(job, paths)[2:] == [project / "lib", Path.home() / "mine", project / "src"]
    with pytest.raises(JobError, match="python_path='lib': is not a list"):
        merge_job(job, ["python_path=lib"])


def test_a_run_finds_them_in_its_snapshot(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunFolder.create(str(tmp_path_factory.mktemp("runs")), "cells", "script: x.py\n", project)
    paths = ["lib", str(project / "src/cells"), "/elsewhere"]
    assert import_paths(run.job, paths)[0] == project
    (run.code / "src").mkdir(parents=True)
    there = [run.code, run.code / "lib", run.code / "src/cells", Path("/elsewhere"), run.code / "src"]
    assert import_paths(run.job, paths) == there


@pytest.mark.parametrize(
    ("code", "clash"),
    [
        ("from trainer import Engine", True), ("import trainer", True), ("from trainer.engine import Engine", True),
        ("import helper", True), ("def late():\n    from nested import loop", True),
        ("from trainer.tasks.digits import Digits", False), ("from . import trainer", False),
        ("import harmless", False), ("import unfinished", False),
    ],
)  # fmt: skip
def test_a_task_that_needs_a_trainer_of_its_own_is_refused(project: Path, code: str, clash: bool) -> None:
    """A script gets it; in a task's process that name is our package's."""
    Path("mine.py").write_text(f"{code}\nclass Mine: pass\n")
    Path("helper.py").write_text("from trainer import Engine\n")
    Path("harmless.py").write_text("import json\n")
    Path("unfinished.py").write_text("import trainer = \n")
    Path("nested").mkdir()
    Path("nested/__init__.py").touch()
    Path("nested/loop.py").write_text("from .. import x\nimport trainer.engine\n")
    Path("job-file.yaml").write_text("task: mine:Mine\n")
    assert to_job(merge_job("job-file.yaml")).task  # while there is none, an import of it is ours to resolve
    Path("trainer.py").write_text("class Engine: pass\n")
    assert find_clash("mine") == (project / "trainer.py" if clash else None)
    if clash:
        with pytest.raises(JobError, match=r"task='mine:Mine': imports trainer.* Rename that module, or .*script"):
            to_job(merge_job("job-file.yaml"))
    with pytest.raises(JobError, match="imports trainer"):
        to_job(merge_job("job-file.yaml", ["task=trainer:Engine"]))


def test_an_installed_trainer_is_not_the_users(project: Path) -> None:
    """Such as a package of that name in `~/.local`, which a task would not get anyhow, and did not mean."""
    folder = project / "lib/python3/site-packages"
    (folder / "trainer").mkdir(parents=True)
    sys.path += [str(project), str(folder)]
    Path("mine.py").write_text("import trainer\nclass Mine: pass\n")
    assert find_clash("mine") is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("-m cells.task", ""), ("-m cells", "no module cells that can be run"), ("-m other", ""), ("-m json.tool", ""),
        ("-m pytest", ""), ("-m nowhere.train", r"no module nowhere.train .*set python_path"), ("good.py", ""),
        ("train.sh", r"is not Python: train.sh line 2"), ("zeros.py", "is not Python"),
        ("lib", "cannot be read"),
    ],
)  # fmt: skip
def test_a_script_that_cannot_run_here_is_refused_when_it_is_submitted(
    project: Path, script: str, expected: str
) -> None:
    Path("good.py").write_text("print('é')\n")
    Path("train.sh").write_text("#!/bin/sh\nexport A=1\n")
    Path("zeros.py").write_bytes(b"a = 1\0")
    places = import_paths(project / "job-file.yaml", ["lib"])
    if not expected:
        return check_script(script, project, places)
    with pytest.raises(JobError, match=f"script='{script}': .*{expected}"):
        check_script(script, project, places)
    return None


@pytest.mark.parametrize("words", [["--version"], ["agent", "--help"]])
def test_our_programs_start_beside_a_module_of_that_name(project: Path, words: list[str]) -> None:
    for name in ("trainer.py", "src/trainer.py", "src/signal.py"):
        Path(name).write_text("raise SystemExit('the wrong module')\n")
    variables = os.environ | {"PYTHONPATH": f"{project}:{project / 'lib'}:{ROOT}"}
    command = [sys.executable, "-m", "muster", *(words if words[0] == "agent" else ["list"])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("usage: python -m trainer", "no runs"))
