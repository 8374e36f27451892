"""One grammar for values, in files and on command lines; text stays as it was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer.config.load import merge_job, to_job
from trainer.config.values import expand_path, hidden_values, parse_value, read_yaml, split_values
from trainer.errors import JobError
from trainer.launch.site import read_site
from trainer.launch.slurm.platform import SlurmSite

VALUES: list[tuple[str, Any]] = [
    ("1e-8", 1e-8), ("1e-1", 0.1), ("1.0e-8", 1e-8), (".5", 0.5), ("-3", -3), ("0x1f", 31), ("1_000", "1_000"),
    ("no", "no"), ("on", "on"), ("true", True), ("False", False), ("null", None), ("~", None),
    ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("010", "010"), ("0", 0), ("1.10", 1.1),
    ("12e4567", math.inf), ("-.inf", -math.inf), ("/a/b", "/a/b"), ("[1, no, 1e-3]", [1, "no", 1e-3]),
    ("{a: 010}", {"a": "010"}), ("'5'", "5"),
    ("${oc.env:HOME}", "${oc.env:HOME}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_value_means_the_same_in_a_file_and_on_a_command_line(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert read_yaml(f"key: {text}") == {"key": value}


@pytest.mark.parametrize("text", ["#ff0000", "Answer: yes", "a # b", "* x", "@home", "50%"])
def test_what_yaml_would_drop_or_refuse_is_text_on_a_command_line(text: str) -> None:
    assert parse_value(text) == text


def test_a_colour_that_yaml_takes_for_a_comment_is_refused() -> None:
    with pytest.raises(ValueError, match="in quotes"):
        read_yaml("a: 1\ncolour: #ff0000\n")
    assert read_yaml("colour: '#ff0000'  # red") == {"colour": "#ff0000"}


def test_text_keys_get_what_was_written(tmp_path: Path) -> None:
    job = tmp_path / "job-file.yaml"
    job.write_text("name: 1.10\nscript: train.py\nscript_args: [--id, 007, --amp, yes, --rate, 1e-3, --big, 12e4567]\n")
    config = merge_job(job)
    assert config.name == "1.10"
    assert list(config.script_args) == ["--id", "007", "--amp", "yes", "--rate", "1e-3", "--big", "12e4567"]
    assert list(merge_job(job, ["script_args=[--x,1.10]"]).script_args) == ["--x", "1.10"]
    job.write_text("task: a:B\ntask_args: {rate: 1e-3, version: '1.10'}\ntrain: {compile: no, lr: 1e-4}\n")
    config = merge_job(job)
    assert config.task_args == {"rate": 1e-3, "version": "1.10"}
    assert config.train.compile is False
    assert config.train.lr == 1e-4


@pytest.mark.parametrize("words", ["[--resume, null, ~, '']", "\n  - --resume\n  - null\n  - ~\n  -"])
def test_arguments_of_a_script_are_words(tmp_path: Path, words: str) -> None:
    job = tmp_path / "job-file.yaml"
    job.write_text(f"script: train.py\nscript_args: {words}\n")
    assert list(merge_job(job).script_args) == ["--resume", "null", "~", ""]


def test_a_colour_in_a_list_is_refused_too() -> None:
    with pytest.raises(ValueError, match="in quotes"):
        read_yaml("colours:\n  - red\n  - #ff0000\n")
    assert read_yaml("colours:\n  - red\n  - '#ff0000'  # as well\n") == {"colours": ["red", "#ff0000"]}


@pytest.mark.parametrize(
    ("word", "expected"), [("'${HOME}'", r"write .*oc.env:NAME"), ("'???'", r"script_args\[0\]='\?\?\?'.*missing")]
)
def test_words_that_mean_something_to_the_reader_are_refused(tmp_path: Path, word: str, expected: str) -> None:
    job = tmp_path / "job-file.yaml"
    job.write_text(f"script: train.py\nscript_args: [{word}]\n")
    with pytest.raises(JobError, match=f"(?i){expected}"):
        to_job(merge_job(job))
    job.write_text("script: train.py\nscript_args: ['\\${HOME}']\n")
    assert to_job(merge_job(job)).script_args == ["${HOME}"]


@pytest.mark.parametrize(
    ("file", "name"), [("digits", "digits"), ("my job (v2)", "my-job-v2"), ("études", "etudes"), ("实验", "job"),
                       ("a,b:c", "a-b-c"), ("x" * 70, "x" * 63)],
)  # fmt: skip
def test_a_job_is_named_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / f"{file}.yaml").write_text("script: train.py\n")
    assert to_job(merge_job(tmp_path / f"{file}.yaml")).name == name


def test_merge_keys_anchors_and_tags() -> None:
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}")["d"] == {"b": 1, "c": 3}
    with pytest.raises(ValueError, match="tag"):
        read_yaml("a: !!python/object:os.system {}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("1,2", ["1", "2"]), ("[8,8],[16,16]", ["[8,8]", "[16,16]"]), ("'a,b',c", ["'a,b'", "c"]),
     ("{a: 1},{a: 2}", ["{a: 1}", "{a: 2}"])],
)  # fmt: skip
def test_values_of_a_sweep(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_paths_begin_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert expand_path("runs", "~/runs") == "/home/someone/runs"
    assert expand_path("runs", "$SCRATCH/runs") == "/scratch/runs"
    for path in ("$NOT_SET/runs", "~nobody-is-called-so/runs"):
        with pytest.raises(JobError, match="runs="):
            expand_path("runs", path)


def test_numbers_are_keys_below_those_that_take_any(tmp_path: Path) -> None:
    job = tmp_path / "job-file.yaml"
    job.write_text("task: a:B\ntask_args: {weights: {0: 1.0, '1': 2.0}}\n")
    assert merge_job(job).task_args == {"weights": {0: 1.0, "1": 2.0}}
    assert merge_job(job, ["task_args.weights={2: 3}"]).task_args["weights"][2] == 3


def test_text_survives_the_way_through_a_saved_job(tmp_path: Path) -> None:
    texts = ["nULL", "tRUE", "0o17", "010", "no", "1.10", "two\ncolour: #fff\nlines"]
    saved = tmp_path / "job.yaml"
    saved.write_text(
        OmegaConf.to_yaml(OmegaConf.create({"task": "a:B", "task_args": {"texts": texts[:3] + texts[6:]}}))
    )
    assert merge_job(saved).task_args["texts"] == texts[:3] + texts[6:]


def test_paths_of_a_site_file_begin_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    site = tmp_path / "site.yaml"
    site.write_text(
        "runs: ~/runs\nsetup: ~/setup.sh\nruntime: apptainer\nimage: $HOME/a.sif\nmounts: ['~/data:/data']\n"
    )
    read = read_site(site, "slurm", SlurmSite)
    assert (read.runs, read.setup) == ("/home/someone/runs", "/home/someone/setup.sh")
    assert (read.image, read.mounts) == ("/home/someone/a.sif", ["/home/someone/data:/data"])


@pytest.mark.parametrize(("name", "value", "line", "is_hidden"), [
    ("USER", "a-long-name", "task_args: {who: NAME}", False),
    ("SLURM_JOB_NAME", "pretraining", "task_args: {who: NAME}", False),
    ("WIDTH", "1024", "task_args: {width: NAME}", False),
    ("PROJECT", "pretraining", "runs: /scratch/NAME/runs", False),
    ("PROJECT", "pretraining", "runs=/scratch/NAME/runs", False),
    ("PROJECT", "pretraining", "task_args: {project: NAME}", True),
    ("PROJECT", "pretraining", "runs: /scratch/NAME/runs\nname: NAME", True),
    ("API_KEY", "1024", "task_args: {key: NAME}", True),
    ("TOKEN", "a-long-text", "runs: /scratch/NAME/runs", True),
    ("SLURM_JWT", "a-long-text", "task_args: {key: NAME}", True),
])  # fmt: skip
def test_only_what_may_be_a_secret_is_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str, is_hidden: bool
) -> None:
    """The rest is a part of paths and of commands to copy, and of messages that have nothing to do with it."""
    monkeypatch.setenv(name, value)
    assert (value in hidden_values(line.replace("NAME", f"${{oc.env:{name}}}"))) is is_hidden
