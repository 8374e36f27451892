"""The task: what user code says about a training. Nothing about ranks, devices or platforms belongs there."""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from trainer.errors import JobError


class Task(ABC):
    """Model, data, loss and metrics of one training.

    Subclass it, name it in a job file as `task: package.module:Class`, give its arguments in `task_args`.
    """

    def prepare(self) -> None:  # noqa: B027  # a task need not have it
        """Download, unpack or index what the datasets need: called once per node, before any rank uses it.

        Node 0 goes first, then all other nodes at once; the ranks wait for it, within `agent.start_timeout_s`. What it
        sets on `self` is lost: each rank has a task of its own. After a failure of it, it is called again; so begin
        with a look at what is there already.

        A task without this method is built by one rank of a node before the others, because its constructor, `model`
        or datasets may do such things. With it, even if it does nothing, all ranks build at once.
        """

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model, on the CPU. The seed is set before: every rank builds the same one."""

    def shard_modules(self, model: nn.Module) -> Iterable[nn.Module] | None:
        """The layers of `model` that `parallel: fsdp` gathers one at a time, such as the blocks of a transformer.

        Each must be called as a module; `train.checkpoint_activations` takes them, too. Default, None: the layers in
        a Sequential, ModuleList or ModuleDict that are large enough (`fsdp.min_params`).
        """
        return None

    def stages(self, model: nn.Module) -> Iterable[nn.Module]:
        """Modules that, one after the other, do what `model` does, for `parallel: pipeline`: it cuts between them.

        The first takes what `inputs` gives, each other what the one before it returns: a tensor, or a tuple of two or
        more, of floating point numbers with a row for each sample. They hold parts and weights of `model`; a weight
        may be in several. Default: the parts of an `nn.Sequential`.
        """
        return model if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward else ()

    @abstractmethod
    def train_dataset(self) -> Dataset[Any]:
        """The training samples; `len()` and `[index]`.

        For random augmentation give the dataset a method `sample(index, rng)`, which is called instead of
        `[index]` with a `numpy.random.Generator` that depends on (seed, epoch, index) alone. A dataset that
        draws from the global generators of `random`, `numpy` or `torch`, or from generators that it holds, works
        too: they are seeded the same way around each sample; set the attribute `deterministic = True` on one that
        draws nothing, to skip that.
        """

    @abstractmethod
    def eval_dataset(self) -> Dataset[Any]:
        """The held-out samples; `len()` and `[index]`."""

    @abstractmethod
    def loss(self, output: Any, batch: Any) -> Tensor | tuple[Tensor, Tensor | float]:
        """One loss per sample, shape (batch,). The trainer takes the mean over the global batch.

        Or (sum, count): the sum of some losses and their number, as numbers or each of shape (batch,). The trainer
        divides the sum over the global batch by the count over the global batch, for means over tokens or the like.

        All global generators of random numbers are seeded from (seed, step, rank) before each step.

        Everything is tried before the first step, in steps that count for nothing. What these change in the model, and
        in attributes of the task, is put back.
        """

    def metrics(self, output: Any, batch: Any) -> Mapping[str, Any]:
        """Per-sample values of the evaluation, each of shape (batch, ...): tensors, arrays or lists."""
        return {}

    def summary(self, sums: Mapping[str, Tensor], count: int) -> Mapping[str, Any]:
        """Turn sums over all `count` held-out samples into the metrics to report; default: means."""
        return {name: float(total) / count for name, total in sums.items() if total.numel() == 1}

    def inputs(self, batch: Any) -> Any:
        """What the model is called with; default: the first element of a tuple or list, else the batch."""
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Call the model; default: with `inputs(batch)`. Another way is `model(**batch)`, with keyword arguments."""
        return model(self.inputs(batch))

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples; default: torch's `default_collate`. It may draw from the global generators."""
        return default_collate(samples)


def find_object(key: str, value: str) -> Any:
    """Import `package.module:Name`. Raises JobError: no such module or name."""
    module, _, name = value.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise JobError(key, value, f"no module {error.name}", f"Import paths: {sys.path[:3]} ...") from None
        raise
    except AttributeError:
        raise JobError(key, value, f"{module} has no {name}", "Correct the name after the colon") from None


def make_task(value: str, arguments: Mapping[str, Any]) -> Task:
    """Import and construct the task of a job. Raises JobError: the class or one of its arguments is wrong."""
    kind = find_object("task", value)
    try:
        task = kind(**arguments)
    except TypeError as error:
        raise JobError("task_args", dict(arguments), str(error), f"See the arguments of {value}") from error
    if not isinstance(task, Task):
        raise JobError("task", value, "is not a subclass of muster.Task", "Write class YourTask(muster.Task)")
    return task
