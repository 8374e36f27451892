"""The job: dataclasses of everything a job file may say, each field with its meaning, unit and limits.

Loading, merging and refusing live in `trainer.config.load`; combinations of fields that contradict each other
in `trainer.config.rules`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _key(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field with its meaning and limits: `choices`, `minimum`, ..., or `path` (`~` and `$NAME` count)."""
    metadata = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


RANKED = ("ddp", "fsdp", "pipeline", "server")
"""The modes with a rank for each device; others are one process."""

# The keys are a table: not one argument a line.
# fmt: off

@dataclass
class Train:
    """The optimization. A step is one update from one global batch."""

    batch_size: int = _key(64, "samples in each step, over all devices and nodes together", minimum=1)
    epochs: int | None = _key(None, "passes over the training data; 1 if you do not set `steps` either", minimum=1)
    steps: int | None = _key(None, "total number of steps; if you set `epochs` too, whichever ends first", minimum=1)
    optimizer: str = _key("adamw", "adamw, adam, sgd, or package.module:callable(params, lr=..., **args)")
    optimizer_args: dict[str, Any] = _key({}, "more keyword arguments for the optimizer")
    lr: float = _key(1e-3, "highest learning rate of the schedule", above=0)
    weight_decay: float = _key(0.0,
        "decay of weights with 2 or more dimensions; biases and other 1-d weights are not decayed", minimum=0)
    schedule: str = _key("cosine", "constant, cosine, linear, or package.module:callable(step, steps) -> factor")
    warmup_steps: int = _key(0, "steps in which the learning rate rises linearly from 0", minimum=0)
    min_lr_ratio: float = _key(0.0, "final learning rate of cosine and linear, as a fraction of `lr`",
        minimum=0, maximum=1)
    accumulate: int = _key(1, "micro-batches in each step; the global batch stays the same", minimum=1)
    clip_norm: float | None = _key(None, "clip gradients to this global norm", above=0)
    precision: str = _key("float32",
        "number format of the forward and backward pass; with bf16 and fp16 the weights stay float32",
        choices=("float32", "bf16", "fp16", "float64"))
    ema_decay: float | None = _key(None, "keep an exponential moving average of the weights, and evaluate that",
        above=0, below=1)
    channels_last: bool = _key(False, "store 4-d weights and inputs in NHWC layout")
    compile: bool = _key(False, "compile the model with torch.compile; with fsdp layer by layer")
    checkpoint_activations: bool = _key(False, "keep no activations inside of layers, and compute them again in the "
        "backward pass; layers are those of Task.shard_modules, else large ones in a Sequential or ModuleList")
    on_nan: str = _key("halt", "what to do when a loss is NaN or infinite: end the run, or skip the update",
        choices=("halt", "skip"))
    deterministic: str = _key("true",
        "use CUDA kernels that give the same bits in each run; where none exists, true ends the run and warn warns",
        choices=("true", "warn", "false"))

    def __post_init__(self) -> None:
        """YAML reads `true` and `false` as what they mean."""
        self.deterministic = str(self.deterministic).lower()


@dataclass
class Data:
    """How samples get to the device."""

    workers: int = _key(0, "data loader processes of each rank; 0: the rank loads its data itself", minimum=0)
    prefetch: int = _key(2, "batches that each worker, or the copy to a GPU, prepares in advance", minimum=1)
    pin_memory: bool = _key(True,
        "use page-locked memory, so that copies to a GPU run in the background; no effect without a GPU")


@dataclass
class Ddp:
    """Options of DistributedDataParallel. With other modes, changing them is an error."""

    bucket_mb: float | None = _key(None,
        "size of a gradient bucket in MiB; null: torch's own sizes, 1 for the first and 25 for the others", above=0)
    static_graph: bool = _key(False, "promise that every step uses the same parameters, which lets torch optimize")
    find_unused_parameters: bool = _key(False, "search every step for parameters without a gradient (slower)")
    sync_batchnorm: bool = _key(False, "compute batch norm statistics over the global batch (needs GPUs)")
    compression: str = _key("none", "compress gradients before they are exchanged",
        choices=("none", "bf16", "fp16", "powersgd"))
    powersgd_rank: int = _key(2, "rank of the approximation with `compression: powersgd`", minimum=1)
    sync_every: int = _key(1, "post-local SGD: after `sync_start` steps, average the weights every this many steps "
        "(1: off, gradients are averaged at every step)", minimum=1)
    sync_start: int = _key(0, "ordinary steps before post-local SGD begins", minimum=0)


@dataclass
class Fsdp:
    """Options of fully sharded data parallelism (torch's fully_shard). With other modes, changing them is an error."""

    min_params: int = _key(100_000, "layers in a Sequential or ModuleList with at least this many weights are gathered "
        "one at a time, unless Task.shard_modules names them; the rest of the model is gathered as one", minimum=1)
    reshard_after_forward: bool = _key(True,
        "give up gathered layers after the forward pass, and gather them again for the backward pass; false: keep them")
    replicate: str = _key("none", "node: the ranks of each node together hold the whole model, and "
        "only averages of gradients cross the network; none: all ranks together hold it once",
        choices=("none", "node"))
    gather: str = _key("full", "full: gather weights as they are; half: as 16-bit numbers of `train.precision`, with "
        "which layers then compute everything; gradients are added in 32 bits either way", choices=("full", "half"))


@dataclass
class Pipeline:
    """Options of a model that is cut into stages, one on each device. With other modes, changing them is an error."""

    stages: int | None = _key(None, "number of stages; with more devices there are several such pipelines, which "
        "divide each batch among them, as ddp does; null: as many as there are devices", minimum=2)
    microbatches: int | None = _key(None, "parts of a batch that follow each other through the stages; null: as many "
        "as there are stages", minimum=1)
    schedule: str = _key("1f1b", "1f1b: each stage goes forward and backward by turns, and keeps few activations; "
        "gpipe: all forward, then all backward", choices=("1f1b", "gpipe"))


@dataclass
class Server:
    """Options of the parameter server, rank 0, which holds the weights. With other modes, changing them is an error."""

    synchronous: bool = _key(True,
        "true: update when all ranks have sent gradients; false: rank 0 only serves, and updates as soon as one of the "
        "others sends some, so that no rank waits, but no two runs give the same weights")


@dataclass
class Evaluation:
    """Evaluation on the held-out data. It is exact: no sample is counted twice or left out."""

    every_epochs: int = _key(1, "evaluate every this many epochs, and always at the end of the run", minimum=1)
    every_steps: int | None = _key(None, "also evaluate every this many steps", minimum=1)
    batch_size: int = _key(256, "samples in each evaluation batch of a device", minimum=1)


@dataclass
class Checkpoints:
    """When checkpoints are saved, and which ones are kept."""

    every_steps: int | None = _key(None, "save every this many steps, and always at the end of an epoch", minimum=1)
    asynchronous: bool = _key(True,
        "write checkpoints in the background, from a copy of the state in memory, which the first node needs room for")
    in_memory: bool = _key(True,
        "keep two copies of the state in the memory of each node, and continue from them after a failure; a few steps "
        "are repeated: as many as take 100 times as long as a copy")
    keep_last: int = _key(2, "how many of the newest checkpoints to keep", minimum=1)
    best: str | None = _key(None, "also keep the checkpoint that is best by this metric")
    best_mode: str = _key("max", "whether a larger or a smaller value of that metric is better", choices=("max", "min"))
    load: str | None = _key(None,
        "start a new run with the weights in this file (.pt, .safetensors) or folder, of any origin", path=True)
    strict: bool = _key(True,
        "refuse to `load` weights that do not fit the model; false: take those that fit, and print which do not")


@dataclass
class Log:
    """What is recorded during training."""

    every_steps: int = _key(10, "write loss, learning rate and speed every this many steps", minimum=1)
    tensorboard: bool = _key(True, "also write these numbers for TensorBoard")
    profile_steps: list[int] = _key([], "[first, last], counted from 1: write a profiler trace of these steps")
    samples: bool = _key(False,
        "record the index of every sample that each step used, to prove that none is lost or repeated (large files)")


@dataclass
class Snapshot:
    """The copy of the code that a run takes along, except on the local platform. Patterns are as in .gitignore."""

    include: list[str] = _key([], "more files to copy: ones that git ignores or, without git, ones that look like data")
    exclude: list[str] = _key([], "files to leave out, also of those that `include` names")


@dataclass
class Agent:
    """Supervision: how failures are noticed, and how often the run is restarted."""

    restarts: int = _key(3, "how many restarts without progress to allow before giving up", minimum=0)
    restarts_total: int = _key(100, "how many restarts to allow in all, with progress in between", minimum=0)
    hang_timeout_s: float = _key(300.0, "seconds without a heartbeat after which a rank counts as hung", above=0)
    start_timeout_s: float = _key(600.0,
        "the same limit until the first step is done: imports, downloads, data, compilation", above=0)
    grace_s: float = _key(30.0,
        "seconds from a stop signal until the ranks are killed; two steps and one save must fit", above=0)
    rejoin_timeout_s: float = _key(120.0, "seconds to wait for the replacement of a lost node", above=0)


@dataclass
class Job:
    """One job file: what to train, how, on how many nodes and devices. Names no platform, site or host."""

    name: str = _key("", "name of the job; its run folders are called NAME-ID; default: the job file's name")
    task: str | None = _key(None,
        "package.module:Class, importable from the working directory, its src, or the job file's folder")
    task_args: dict[str, Any] = _key({}, "keyword arguments for the constructor of the task")
    script: str | None = _key(None,
        "instead of a task: a script that torchrun can start, or -m package.module", path=True)
    script_args: list[str] = _key([], "command-line arguments of the script, word for word: no shell reads them")
    python_path: list[str] = _key([],
        "more folders to import from, as PYTHONPATH, from the working directory on; `src` is looked into if it exists",
        path=True)
    preload: list[str] = _key([],
        "installed modules that each node imports once, not each rank at each start: [transformers.trainer]")
    parallel: str = _key("auto",
        "single, dp (DataParallel: one process on one node), ddp, fsdp (each rank holds a part of each weight), "
        "pipeline (a stage of the model on each device), or server (a parameter server, to compare with); auto: ddp "
        "for more than one device", choices=("auto", "single", "dp", "ddp", "fsdp", "pipeline", "server"))
    nodes: int = _key(1, "number of nodes; each runs one agent", minimum=1)
    devices_per_node: int = _key(1,
        "number of devices on each node; except with single and dp this is also the number of ranks", minimum=1)
    devices: list[int] | None = _key(None,
        "which devices of the node to use, the primary one first, for example [2,3,1]")
    device: str = _key("auto", "auto: GPUs if the node has enough of them, otherwise the CPU",
        choices=("auto", "cpu", "cuda"))
    seed: int = _key(0, "seed for initial weights, sample order, augmentation and dropout",
        minimum=0, maximum=2**32 - 1)
    runs: str = _key("runs", "folder in which run folders are created", path=True)
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    ddp: Ddp = field(default_factory=Ddp)
    fsdp: Fsdp = field(default_factory=Fsdp)
    pipeline: Pipeline = field(default_factory=Pipeline)
    server: Server = field(default_factory=Server)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    snapshot: Snapshot = field(default_factory=Snapshot)
    agent: Agent = field(default_factory=Agent)

    @property
    def ranks_per_node(self) -> int:
        """Processes that each agent forks: one per device, but for single and dp one for all."""
        return self.devices_per_node if self.parallel in RANKED else 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def parts(self) -> int:
        """Ranks, or pipelines, that a global batch is divided among."""
        if self.parallel == "pipeline":
            return self.world_size // (self.pipeline.stages or self.world_size)
        return self.world_size - (self.parallel == "server" and not self.server.synchronous)
