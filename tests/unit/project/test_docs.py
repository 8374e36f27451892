"""What the documents say is so: links, paths, commands, and every key with its default."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainer.config.load import merge_job, to_job
from trainer.errors import JobError
from trainer.launch.cli import app

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def code(document: Path, language: str) -> str:
    """All blocks of one language."""
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_and_verbs_exist(document: Path) -> None:
    commands = code(document, "console")
    targets = set(re.findall(r"^make ([a-z0-9-]+)", commands, re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    verbs = {command.name or command.callback.__name__.rstrip("_") for command in app.registered_commands}
    assert set(re.findall(r"^(?:\.venv/bin/)?muster ([a-z]+)", commands, re.MULTILINE)) <= verbs


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_keys_of_commands_are_valid(document: Path) -> None:
    """Each line's key=value words together, on the job that the line names or else the main one."""
    for line in code(document, "console").splitlines():
        line = re.sub(r"--sweep ([\w.]+=[^,\s]+)\S*", r"\1", line.partition("  # ")[0])
        words = re.findall(r"(?<=[\s\"=])[a-z_]+(?:\.[a-z_]+)*=[^\s\"]+", re.sub(r"--\S+=\S+", "", line))
        job = re.search(r"(?:jobs|docs)/\S+\.yaml", line)
        to_job(merge_job(ROOT / (job[0] if job else "jobs/digits.yaml"), words))


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    for line in (
        'make train ARGS="nodes=1 train.epoch=3"',
        "make train ARGS=train.epoch=3",
        "muster run X train.epoch=3",
    ):
        path.write_text(f"```console\n{line}    # train it\n```\n")
        with pytest.raises(JobError, match=r"train\.epoch=3.*train\.epochs"):
            test_keys_of_commands_are_valid(path)


def test_named_files_exist() -> None:
    table = (ROOT / "README.md").read_text().partition("## Files")[2]
    names = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", table, re.MULTILINE)
    paths = [path for name in names for path in re.findall(r"`([^`]+)`", name)]
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [
        job for job in re.findall(r"jobs/\w+\.yaml", (ROOT / "README.md").read_text()) if not (ROOT / job).exists()
    ] == []


def test_every_key_is_described_with_its_present_default() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "trainer.config.reference"], cwd=ROOT, capture_output=True, text=True
    )
    assert printed.returncode == 0
    remedy = "python -m trainer.config.reference > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == printed.stdout, remedy
