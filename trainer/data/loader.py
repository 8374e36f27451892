"""Loading: batches of a dataset in the order of their keys, in the rank or in worker processes.

Which samples, and in which order, is decided in `trainer.data.sampler`; how a batch is made, in `trainer.data.batches`.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.config.job import Data
from trainer.data.batches import BatchDataset, Collating, Keys
from trainer.data.nested import map_tensors
from trainer.data.open_files import take_own_places
from trainer.errors import JobError
from trainer.signals import ignore_signals, set_parent_death_signal
from trainer.wiring.variables import HEARTBEAT, read_path


def _start_worker(_: int) -> None:
    """Signals reach the whole process group; only the rank answers them. Its workers end with it, even if killed.

    A worker that outlived its rank would hold the rank's connections open, so that its peers would wait.
    """
    ignore_signals()
    take_own_places()
    rank = multiprocessing.parent_process()
    assert rank is not None and rank.pid is not None
    set_parent_death_signal(rank.pid, signal.SIGKILL)
    heartbeat = read_path(HEARTBEAT)
    if heartbeat is not None:  # its rank may die without a word: the agent removes what this worker leaves in memory
        with contextlib.suppress(OSError):
            heartbeat.with_name(f"worker-{os.getpid()}").touch()


def _unless_refused(batch: Any) -> Any:
    if isinstance(batch, JobError):
        raise batch
    return batch


class Loader:
    """Batches for given keys, read in order, in worker processes when asked for."""

    def __init__(
        self, dataset: Dataset[Any], task: Collating, options: Data, seed: int, pin: bool, key: str = "dataset"
    ) -> None:  # fmt: skip
        """`pin`: batches go to a GPU, so put them into page-locked memory; `key`: what errors call the dataset."""
        self.batches = BatchDataset(dataset, task, seed, key)
        self.pin = pin and options.pin_memory
        self.keys: Iterable[Keys] = ()
        self.workers: DataLoader[Any] | None = None
        self.iterator: Any = None  # of torch, over all epochs
        self.processes: list[Any] = []
        if options.workers:
            # A rank's own default context is a second fork server: 3 s, torch again. A key is a batch, hence no size.
            self.workers = DataLoader(
                self.batches, batch_size=None, sampler=self, collate_fn=lambda batch: batch, pin_memory=self.pin,
                num_workers=options.workers, prefetch_factor=options.prefetch, persistent_workers=True,
                multiprocessing_context="fork", worker_init_fn=_start_worker,
            )  # fmt: skip

    def read(self, keys: Iterable[Keys]) -> Iterator[Any]:
        """The batch of each of `keys`; workers start with the first call. Raises JobError: one cannot be made."""
        if self.workers is None:
            batches: Iterator[Any] = map(_unless_refused, map(self.batches.__getitem__, keys))
            return (map_tensors(batch, Tensor.pin_memory) for batch in batches) if self.pin else batches
        self.keys = keys
        before = multiprocessing.active_children()
        iterator = self.iterator = iter(self.workers)
        self.processes += [child for child in multiprocessing.active_children() if child not in before]
        return map(_unless_refused, iterator)

    def __iter__(self) -> Iterator[Keys]:
        """What torch's workers read."""
        return iter(self.keys)

    def close(self) -> None:
        """End the workers; at exit multiprocessing would terminate them, which they ignore, and wait forever.

        torch ends them when nobody refers to their iterator any more. After an exception its traceback does, so the
        method that torch would call is called here, by its private name: there is no public one.
        """
        if self.iterator is not None:
            self.iterator._shutdown_workers()
        for worker in self.processes:
            worker.kill()  # one that is stuck in user code
