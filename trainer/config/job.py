"""The job: dataclasses of everything a job file may say, each field with its meaning, unit and limits.

Loading, merging and refusing live in `trainer.config.load`; combinations of fields that contradict each other
in `trainer.config.rules`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Limits = dict[str, Any]


def _option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field with its meaning and limits (`choices`, `minimum`, `maximum`, `above`, `below`)."""
    metadata: Limits = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Train:
    """The optimisation: every count is in steps of the global batch."""

    batch_size: int = _option(64, "samples per step over all devices and nodes together", minimum=1)
    epochs: int | None = _option(None, "passes over the training data; 1 when `steps` is not given either", minimum=1)
    steps: int | None = _option(None, "steps in all; with `epochs`, whichever ends first", minimum=1)
    optimizer: str = _option("adamw", "adamw, adam, sgd, or package.module:callable(params, lr=..., **args)")
    optimizer_args: dict[str, Any] = _option({}, "further keyword arguments of the optimizer")
    lr: float = _option(1e-3, "peak learning rate", above=0)
    weight_decay: float = _option(
        0.0, "decay of weights with 2 or more dimensions; 1-d ones are not decayed", minimum=0
    )
    schedule: str = _option("cosine", "constant, cosine, linear, or package.module:callable(step, steps) -> factor")
    warmup_steps: int = _option(0, "steps of linear warm-up from 0", minimum=0)
    min_lr_ratio: float = _option(0.0, "where cosine and linear end, as a share of `lr`", minimum=0, maximum=1)
    accumulate: int = _option(1, "micro-batches per step; the global batch stays the same", minimum=1)
    clip_norm: float | None = _option(None, "largest global gradient norm", above=0)
    precision: str = _option(
        "float32",
        "arithmetic of forward and backward; weights stay float32 in bf16 and fp16",
        choices=("float32", "bf16", "fp16", "float64"),
    )
    ema_decay: float | None = _option(
        None, "keep an exponential moving average of the weights and evaluate it", above=0, below=1
    )
    channels_last: bool = _option(False, "lay 4-d weights and inputs out as NHWC")
    compile: bool = _option(False, "torch.compile the model")
    on_nan: str = _option("halt", "what all ranks do when a loss is NaN or infinite", choices=("halt", "skip"))
    deterministic: bool = _option(
        True, "CUDA kernels that give the same bits in each run; warn if the first step has none"
    )


@dataclass
class Data:
    """How samples reach the device."""

    workers: int = _option(0, "loader processes per rank; 0 loads in the rank itself", minimum=0)
    prefetch: int = _option(2, "batches that each worker, or the copy to a GPU, keeps ahead", minimum=1)
    pin_memory: bool = _option(True, "page-locked host memory for asynchronous copies; without a GPU it is not used")


@dataclass
class Ddp:
    """Options of DistributedDataParallel; refused under other modes when changed."""

    bucket_mb: float | None = _option(
        None,
        "gradient bucket, MiB; null: a first one of 1, then 25 (pytorch#118421 finds 25 small for fast links)",
        above=0,
    )
    static_graph: bool = _option(False, "promise that each step uses the same parameters")
    find_unused_parameters: bool = _option(False, "search each step for parameters without a gradient (slower)")
    sync_batchnorm: bool = _option(False, "batch statistics over the global batch (needs GPUs)")
    compression: str = _option("none", "gradient compression hook", choices=("none", "bf16", "fp16", "powersgd"))
    powersgd_rank: int = _option(2, "rank of the PowerSGD approximation", minimum=1)
    sync_every: int = _option(
        1,
        "post-local SGD: average weights every so many steps after `sync_start` steps "
        "(1: gradients are averaged at every step)",
        minimum=1,
    )
    sync_start: int = _option(0, "steps with ordinary gradient averaging before post-local SGD begins", minimum=0)


@dataclass
class Evaluation:
    """Exact evaluation on the held-out data: no sample twice, none left out."""

    every_epochs: int = _option(1, "evaluate after so many epochs; the end of the run always evaluates", minimum=1)
    every_steps: int | None = _option(None, "also evaluate after so many steps", minimum=1)
    batch_size: int = _option(256, "samples per evaluation batch on one device", minimum=1)


@dataclass
class Checkpoints:
    """When checkpoints are committed and which are kept."""

    every_steps: int | None = _option(
        None, "commit after so many steps; the end of each epoch always commits", minimum=1
    )
    asynchronous: bool = _option(
        True, "write beside the training, from a copy: one more state in the memory of rank 0, and no wait for the disk"
    )
    in_memory: bool = _option(
        True,
        "after a failure go on from the state that surviving ranks hold: no step is lost (ddp on CPUs, with an agent)",
    )
    keep_last: int = _option(2, "how many of the newest to keep", minimum=1)
    best: str | None = _option(None, "metric whose best checkpoint is kept too")
    best_mode: str = _option("max", "whether a larger or a smaller metric is better", choices=("max", "min"))
    load: str | None = _option(None, "start a new run from the weights of this checkpoint folder or model.pt")


@dataclass
class Log:
    """What is written while training."""

    every_steps: int = _option(10, "write loss, learning rate and speed every so many steps", minimum=1)
    tensorboard: bool = _option(True, "write the same scalars for TensorBoard")
    profile_steps: list[int] = _option([], "[first, last], counted from 1: write a profiler trace of these steps")
    samples: bool = _option(False, "record the index of every sample that each step consumed (a proof, and large)")


@dataclass
class Agent:
    """Supervision: how faults are noticed and how often the run starts again."""

    restarts: int = _option(3, "restarts without progress before giving up", minimum=0)
    hang_timeout_s: float = _option(300.0, "seconds without a heartbeat of a rank until it counts as hung", above=0)
    start_timeout_s: float = _option(600.0, "the same before the first step: imports, data, compilation", above=0)
    grace_s: float = _option(
        30.0, "seconds from a stop signal to the end: one step, on GPUs two, and one save must fit", above=0
    )
    rejoin_timeout_s: float = _option(120.0, "seconds to wait for a lost node's replacement", above=0)


@dataclass
class Job:
    """One job file: what to train, how, on how many nodes and devices. Names no platform, site or host."""

    name: str = _option("", "run folders are called <name>-<id>; default: the job file's name")
    task: str | None = _option(None, "package.module:Class, importable from the working or the job file's folder")
    task_args: dict[str, Any] = _option({}, "keyword arguments of the task's class")
    script: str | None = _option(None, "instead of a task: a script that torchrun could start")
    script_args: list[str] = _option([], "arguments of the script")
    parallel: str = _option(
        "auto",
        "single, dp (one node, one process) or ddp; auto: ddp for more than one device",
        choices=("auto", "single", "dp", "ddp"),
    )
    nodes: int = _option(1, "nodes; each runs one agent", minimum=1)
    devices_per_node: int = _option(1, "devices per node; with ddp also ranks per node", minimum=1)
    devices: list[int] | None = _option(None, "physical devices to use, the primary first, e.g. [2,3,1]")
    device: str = _option(
        "auto", "auto: GPUs when a node has enough of them, else CPU", choices=("auto", "cpu", "cuda")
    )
    seed: int = _option(0, "of initial weights, sample order, augmentation and dropout", minimum=0, maximum=2**32 - 1)
    runs: str = _option("runs", "folder that run folders are made in")
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    ddp: Ddp = field(default_factory=Ddp)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    agent: Agent = field(default_factory=Agent)

    @property
    def ranks_per_node(self) -> int:
        """Processes that each agent forks: one per device under ddp and for scripts, else one."""
        return self.devices_per_node if self.parallel == "ddp" else 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node
