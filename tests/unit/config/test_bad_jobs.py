"""Every mistake in a job is refused before anything starts, by one message: key, value, what is wrong, what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import merge_job, to_job
from trainer.errors import JobError

JOB = """
task: trainer.tasks.digits:Digits
train: {batch_size: 64, epochs: 2}
"""
DDP = ["devices_per_node=2"]

# What the user wrote; then all that the message must contain.
KEYS = [
    (["trian.lr=0.1"], "trian.lr=0.1", "unknown key", "Did you mean train.lr?"),
    (["lr=0.1"], "lr=0.1", "unknown key", "Did you mean train.lr?"),
    (["train.batchsize=8"], "train.batchsize=8", "Did you mean train.batch_size?"),
    (["data.learning_rate=1"], "data.learning_rate=1", "unknown key"),
    (["zzz=1"], "zzz=1", "unknown key", "docs/configuration.md"),
    (["train=5"], "train=5", "is a section, not a value", "train.<key>"),
    (["train.lr.x=5"], "train.lr={'x': 5}", "expected float: highest learning rate"),
    (["train.lr"], "argument='train.lr'", "is not key=value"),
    (["--lr=3"], "argument='--lr=3'", "is not key=value"),
    (["=3"], "argument='=3'", "is not key=value"),
]  # fmt: skip
VALUES = [
    (["train.batch_size=many"], "train.batch_size='many'", "int"),
    (["train.batch_size=1.5"], "train.batch_size=1.5", "int"),
    (["train.batch_size=true"], "train.batch_size=True", "int"),
    (["train.batch_size=[8]"], "train.batch_size=[8]", "int"),
    (["train.lr=fast"], "train.lr='fast'", "float"),
    (["train.lr=null"], "train.lr=None"),
    (["train.compile=perhaps"], "train.compile='perhaps'", "bool"),
    (["preload=[os;1]"], "preload=['os;1']", "are not names of modules"),
    (["devices=all"], "devices='all'"),
    (["devices=[a]"], "devices"),
    (["task_args=7"], "task_args=7"),
    (["name=[x]"], "name=['x']"),
    (["name=${name}"], "name=", "Recursive interpolation"),
    (["name=${nowhere}"], "name=", "'nowhere' not found"),
    (["task_args=[1]"], "task_args=[1]", "is a list, not a mapping", "arguments for the constructor of the task"),
    (["train.optimizer_args=[1]"], "train.optimizer_args=[1]", "is a list, not a mapping"),
    (["devices={a: 1}"], "devices={'a': 1}", "is a mapping, not a list", "which devices of the node"),
    (["devices=[[1]]"], "devices=[[1]]", "holds more than single values"),
    (["devices=&a [*a]"], "devices='&a [*a]'", "is not a list"),
    (["devices=[&a [*a]]"], "devices=", "cannot be parsed", "recursion"),
    (["train.lr=[1"], "train.lr='[1'", "cannot be parsed"),
    (["train.lr=${train.lrate}"], "train.lr", "lrate"),
    (["train.lr=${oc.env:NOT_SET_ANYWHERE}"], "train.lr", "NOT_SET_ANYWHERE"),
]  # fmt: skip
RANGES = [
    (["train.batch_size=0"], "train.batch_size=0", "at least 1"),
    (["train.batch_size=-64"], "train.batch_size=-64", "at least 1"),
    (["train.lr=0"], "train.lr=0", "more than 0"),
    (["train.lr=-0.1"], "train.lr=-0.1", "more than 0"),
    (["train.lr=-1e-3"], "train.lr=-0.001", "more than 0"),  # YAML 1.1 reads 1e-3 as text
    (["train.lr='-5'"], "train.lr=-5", "more than 0"),
    (["train.lr=.nan"], "train.lr=nan", "finite"),
    (["train.lr=.inf"], "train.lr=inf", "finite"),
    (["train.min_lr_ratio=1.5"], "train.min_lr_ratio=1.5", "at most 1"),
    (["train.min_lr_ratio=${train.lr}", "train.lr=3"], "train.min_lr_ratio=3", "at most 1"),
    (["train.precision=${oc.env:HOME}"], "train.precision=", "must be one of float32"),
    (["train.ema_decay=0"], "train.ema_decay=0", "more than 0"),
    (["train.ema_decay=1"], "train.ema_decay=1", "less than 1"),
    (["seed=-1"], "seed=-1", "at least 0"),
    (["seed=4294967296"], "seed=4294967296", "at most 4294967295"),
    (["seed=" + "9" * 400], "seed=999", "too large a number"),
    (["seed=" + "9" * 5000], "seed='999", "cannot be parsed"),
    (["train.lr=" + "9" * 400], "train.lr=999", "too large a number", "highest learning rate"),
    (["nodes=0"], "nodes=0", "at least 1"),
    (["train.precision=bf-16"], "train.precision='bf-16'", "Did you mean bf16?"),
    (["parallel=ddpp"], "parallel='ddpp'", "Did you mean ddp?"),
    (["device=gpu"], "device='gpu'", "auto, cpu, cuda"),
    (["train.on_nan=ignore"], "train.on_nan='ignore'", "halt, skip"),
    (["ddp.compression=fp8", *DDP], "ddp.compression='fp8'", "none, bf16, fp16, powersgd"),
    (["log.profile_steps=[3]"], "log.profile_steps=[3]", "[first, last]"),
    (["log.profile_steps=[0,3]"], "log.profile_steps=[0, 3]", "counted from 1"),
    (["log.profile_steps=[5,3]"], "log.profile_steps=[5, 3]", "[first, last]"),
    (["name=a/b"], "name='a/b'", "letters, digits"),
    (["name=-x"], "name='-x'", "letter or digit"),
    (["devices=[]"], "devices=[]", "different device numbers"),
    (["devices=[1,1]"], "devices=[1, 1]", "different device numbers"),
    (["devices=[-1]"], "devices=[-1]", "different device numbers"),
]  # fmt: skip
ASYNC = ["server.synchronous=false"]
COMBINATIONS = [
    (["train.batch_size=10", "devices_per_node=4"], "train.batch_size=10", "4 ranks x 1 micro-batches", "8 or 12"),
    (["train.batch_size=3", "devices_per_node=4"], "train.batch_size=3", "nearest sizes that do: 4"),
    (["train.accumulate=7", *DDP], "train.batch_size=64", "2 ranks x 7 micro-batches", "56 or 70"),
    (["parallel=dp", "devices_per_node=3", "train.batch_size=2"], "train.batch_size=2", "too small", "at least 3"),
    (["parallel=single", *DDP], "devices_per_node=2", "one device", "parallel=ddp"),
    (["parallel=single", "nodes=2"], "nodes=2", "parallel=ddp"),
    (["parallel=dp", "nodes=2", *DDP], "nodes=2", "one node", "parallel=ddp for several nodes"),
    (["devices=[0,1]", "nodes=2"], "devices=[0, 1]", "one node only"),
    (["devices=[0,1]", "devices_per_node=3"], "devices_per_node=3", "contradicts devices=[0, 1]"),
    (["parallel=dp", "ddp.bucket_mb=5", *DDP], "ddp.bucket_mb=5", "would be ignored with parallel=dp"),
    (["ddp.static_graph=true"], "ddp.static_graph=True", "would be ignored with parallel=single"),
    (["ddp.static_graph=true", "train.accumulate=2", *DDP], "ddp.static_graph=True", "train.accumulate=2"),
    (["ddp.static_graph=true", "ddp.find_unused_parameters=true", *DDP], "ddp.static_graph=True", "contradicts"),
    (["ddp.static_graph=true", "ddp.sync_every=2", *DDP], "ddp.static_graph=True", "sync_every=1"),
    (["ddp.sync_every=2", "ddp.compression=bf16", *DDP], "ddp.compression='bf16'", "sync_every=1"),
    (["ddp.sync_every=2", "train.on_nan=skip", *DDP], "train.on_nan='skip'", "sync_every=1"),
    (["ddp.sync_every=2", "train.ema_decay=0.9", *DDP], "train.ema_decay=0.9", "sync_every=1"),
    (["ddp.sync_every=2", "train.precision=fp16", *DDP], "train.precision='fp16'", "sync_every=1"),
    (["ddp.sync_start=5", *DDP], "ddp.sync_start=5", "would be ignored"),
    (["ddp.powersgd_rank=4", *DDP], "ddp.powersgd_rank=4", "compression=powersgd"),
    (["ddp.compression=powersgd", "train.on_nan=skip", *DDP], "train.on_nan='skip'", "a NaN would stay"),
    (["ddp.compression=fp16", "train.precision=float64", *DDP], "ddp.compression='fp16'", "float64"),
    (["parallel=dp", "train.compile=true", *DDP], "train.compile=True", "parallel=ddp"),
    (["parallel=pipeline"], "devices_per_node=1", "one stage", "parallel=single"),
    (["parallel=pipeline", "pipeline.stages=3", *DDP], "pipeline.stages=3", "does not divide the 2 devices"),
    (["parallel=pipeline", "pipeline.microbatches=1", *DDP], "pipeline.microbatches=1", "Use 2 or more", "gpipe"),
    (["parallel=pipeline", "pipeline.microbatches=3", *DDP], "train.batch_size=64", "1 pipelines x 3", "63 or 66"),
    (["parallel=pipeline", "train.ema_decay=0.9", *DDP], "train.ema_decay=0.9", "model in stages"),
    (["parallel=pipeline", "train.compile=true", *DDP], "train.compile=True", "model in stages"),
    (["parallel=pipeline", "train.precision=fp16", *DDP], "train.precision='fp16'", "scales losses", "bf16"),
    (["pipeline.schedule=gpipe", *DDP], "pipeline.schedule='gpipe'", "would be ignored", "parallel=pipeline"),
    (["parallel=server"], "devices_per_node=1", "without others", "parallel=single"),
    (["parallel=server", "train.precision=fp16", *DDP], "train.precision='fp16'", "parameter server", "bf16"),
    (["parallel=server", *ASYNC, "train.ema_decay=0.9", *DDP], "train.ema_decay=0.9", "asynchronous"),
    ([*ASYNC, *DDP], "server.synchronous=False", "would be ignored with parallel=ddp", "parallel=server"),
    (["parallel=server", *ASYNC, "devices_per_node=4"], "train.batch_size=64", "3 ranks x 1", "63 or 66"),
    (["device=cpu", "train.precision=fp16"], "train.precision='fp16'", "needs a GPU", "bf16"),
    (["device=cpu", "ddp.sync_batchnorm=true", *DDP], "ddp.sync_batchnorm=True", "GPUs only"),
    (["fsdp.min_params=5", *DDP], "fsdp.min_params=5", "would be ignored with parallel=ddp", "parallel=fsdp"),
    (["parallel=fsdp", "ddp.bucket_mb=5", *DDP], "ddp.bucket_mb=5", "would be ignored with parallel=fsdp"),
    (["parallel=fsdp", "train.ema_decay=0.9", *DDP], "train.ema_decay=0.9", "the whole average", "parallel=ddp"),
    (["parallel=fsdp", "train.channels_last=true", *DDP], "train.channels_last=True", "no other layout"),
    (["parallel=fsdp", "fsdp.gather=half", *DDP], "fsdp.gather='half'", "train.precision=float32"),
    (["parallel=fsdp", "fsdp.replicate=node", *DDP], "fsdp.replicate='node'", "there is one node"),
    (["parallel=fsdp", "fsdp.replicate=node", "nodes=2"], "fsdp.replicate='node'", "nothing to shard"),
    (["checkpoint.best_mode=min"], "checkpoint.best_mode='min'", "checkpoint.best"),
    (["train.optimizer_args.lr=1"], "train.optimizer_args.lr=1", "set twice", "train.lr"),
    (["script=train.py"], "script='train.py'", "contradicts task="),
    (["script_args=[x]"], "script_args=['x']", "there is no script"),
    (["task=null"], "task=None", "what to run"),
    (["task=null", "script=t.py", "parallel=dp"], "parallel='dp'", "the script decides that itself"),
]  # fmt: skip
NAMES = [
    (["task=trainer.tasks.digits"], "task='trainer.tasks.digits'", "is not package.module:Name"),
    (["task=trainer.tasks.digit:Digits"], "no module trainer.tasks.digit", "job file's folder"),
    (["task=trainer.tasks.digits:Digit"], "Did you mean trainer.tasks.digits:Digits?"),
    (["task=nowhere:Task"], "no module nowhere"),
    (["task_args.widht=3"], "task_args.widht=3", "Digits has no such argument", "Did you mean width?"),
    (["task_args={zoom: 3}"], "task_args.zoom=3", "It takes: width"),
    (["train.optimizer=adamww"], "train.optimizer='adamww'", "Did you mean adamw?"),
    (["train.optimizer=torch.optim:3"], "train.optimizer='torch.optim:3'", "is not package.module:Name"),
    (["train.optimizer=torch.optimm:Adam"], "no module torch.optimm"),
    (["train.schedule=torch.optim.lr_scheduler:StepLR"], "is a torch scheduler", "(step, steps) -> factor"),
    (["train.schedule=cosin"], "train.schedule='cosin'", "Did you mean cosine?"),
    (["train.schedule=trainer.training.optimizer:missing"], "defines no missing"),
]  # fmt: skip
ALL = {"key": KEYS, "value": VALUES, "range": RANGES, "combination": COMBINATIONS, "name": NAMES}


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job file without a mistake."""
    file = tmp_path_factory.mktemp("job") / "digits.yaml"
    file.write_text(JOB)
    to_job(merge_job(file))
    return file


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind} {' '.join(case[0])}") for kind, cases in ALL.items() for case in cases]
)
def test_command_line(job_file: Path, case: tuple[Any, ...]) -> None:
    overrides, *expected = case
    with pytest.raises(JobError) as caught:
        to_job(merge_job(job_file, overrides))
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert "\n" not in message
    assert re.search(r"\. [A-Z]", message), f"no remedy in: {message}"


@pytest.mark.parametrize("text, expected", [
    ("task: [", ["is not valid YAML", "line"]),
    ("task: a\ntask: b", ["is not valid YAML", "'task' is given twice"]),
    ("train: {lr: 1, lr: 2}", ["'lr' is given twice"]),
    ("- a\n- b", ["is not a mapping of keys"]),
    ("just words", ["is not a mapping of keys"]),
    ("task: trainer.tasks.digits:Digits\ntrain: {epoch: 3}", ["train.epoch=3", "Did you mean train.epochs?"]),
    ("task: trainer.tasks.digits:Digits\ntrain: 3", ["train=3", "is a section"]),
    ("task: trainer.tasks.digits:Digits\npartition: gpu", ["partition='gpu'", "unknown key"]),
    ("task: trainer.tasks.digits:Digits\ntrain: {batch_size: 'x'}", ["train.batch_size='x'"]),
    ("script: train.py\nscript_args: {marks: x}", ["script_args={'marks': 'x'}", "is a mapping, not a list"]),
    ("", ["task=None", "what to run"]),
])  # fmt: skip
def test_job_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(JobError) as caught:
        to_job(merge_job(file))
    for part in expected:
        assert part in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(JOB)
    with pytest.raises(JobError, match=r"digit\.yaml.*no such file.*Did you mean .*digits\.yaml\?"):
        to_job(merge_job(tmp_path / "digit.yaml"))
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(JobError, match="cannot be read"):
        to_job(merge_job(tmp_path / "picture.yaml"))
    with pytest.raises(JobError, match=r"job\.yaml.*no such file"):
        to_job(merge_job(tmp_path))


def test_the_users_module_is_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')\nclass Mine: pass\n")
    (tmp_path / "broken.py").write_text("class Mine(:\n")
    (tmp_path / "digits.yaml").write_text(JOB)
    assert to_job(merge_job(tmp_path / "digits.yaml", ["task=mine:Mine"])).task == "mine:Mine"
    with pytest.raises(JobError, match=r"broken\.py line 1"):
        to_job(merge_job(tmp_path / "digits.yaml", ["task=broken:Mine"]))
