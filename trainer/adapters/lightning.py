"""`muster.lightning.attach(trainer, session)`: Lightning's `Trainer` on a session.

Its loops, callbacks, loggers and precision stay its own. The session gives it batches in the exact order, keeps its
state beside the weights, and restores both where the run goes on. Fabric needs no adapter: see docs/your-script.md.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from trainer.adapters.loader import SessionLoader, refuse_settings, say_if_changed
from trainer.errors import JobError
from trainer.parallel.wrapping import settle
from trainer.training.session import Session

STATE = "the session's state"
"""What the trainer is given for a path."""
WEIGHTS = "state_dict"
"""The weights in a checkpoint of Lightning's."""
LEFT_OUT = {WEIGHTS, "hyper", "hparams"}
"""Words in names of what a session need not keep of it: it has the weights elsewhere, and the script says the rest."""


def devices(session: Session) -> dict[str, Any]:
    """What `Trainer(...)` and `Fabric(...)` must be told to run on the session's ranks."""
    job = session.job
    return {
        "accelerator": "gpu" if session.device.type == "cuda" else "cpu", "devices": job.devices_per_node,
        "num_nodes": job.nodes, "strategy": "ddp" if session.world_size > 1 else "auto",
    }  # fmt: skip


def attach(trainer: Trainer, session: Session) -> None:
    """Let a trainer train on a session. Call it once, before `trainer.fit(...)`.

    The global batch is `batch_size` of the training loader times ranks and `accumulate_grad_batches` when the run
    begins, and stays so when the run goes on with more or fewer ranks. Raises JobError: the trainer does what a session
    could not repeat.
    """
    _check(trainer, session)
    Attached(trainer, session)


def _check(trainer: Any, session: Session) -> None:
    changing = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    strategy = type(trainer.strategy).__name__
    refuse_settings("Trainer", (
        ("devices", trainer.world_size, trainer.world_size != session.world_size,
         f"the session has {session.world_size} ranks", "Write Trainer(**muster.lightning.devices(session), ...)"),
        ("strategy", strategy, not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)),
         "splits what a session keeps whole", "Use ddp"),
        ("overfit_batches", trainer.overfit_batches, trainer.overfit_batches, "would leave samples out", "Remove it"),
        ("limit_train_batches", trainer.limit_train_batches, trainer.limit_train_batches not in (1.0, None),
         "would leave samples out", "Give torch.utils.data.Subset to the loader"),
        ("reload_dataloaders_every_n_epochs", trainer.reload_dataloaders_every_n_epochs,
         trainer.reload_dataloaders_every_n_epochs, "would change the data in between", "Remove it"),
        ("callbacks", "GradientAccumulationScheduler", changing, "would change the global batch", "Remove it"),
    ))  # fmt: skip


class Attached(Callback):
    """What is between a trainer and its session: the trainer calls it as a callback, and in place of a few methods."""

    def __init__(self, trainer: Any, session: Session) -> None:
        self.trainer, self.session, self.kept = trainer, session, Kept(self)
        self.restored: dict[str, Any] = {}
        """What Lightning would have read from a checkpoint, where the run goes on."""
        self.done = False
        """Whether the training has come to an early end."""
        self.metrics: dict[str, Any] = {}
        """What schedulers and callbacks may look at there, of evaluations before."""
        self.batch_size = 0
        self.loader: SessionLoader | None = None
        self.loss: Any = 0.0
        self.weight = 1.0
        session.track(trainer=self.kept)
        # Methods of instances, and private ones among them, because Lightning calls no hook there: where it gives a
        # loader another sampler, and where its loop goes on from a checkpoint. Its handler of signals would begin a
        # collective at any moment, and leave no signal to the session.
        places: dict[str, Any] = {
            "fit": trainer, "load_checkpoint": trainer.strategy, "_prepare_dataloader": trainer._data_connector,
            "reset": trainer.fit_loop.epoch_loop, "register_signal_handlers": trainer._signal_connector,
        }  # fmt: skip
        self.own: Any = {name: getattr(place, name) for name, place in places.items()}
        for name, place in places.items():
            setattr(place, name, getattr(self, name))
        trainer.callbacks.append(self)
        trainer.loggers = [*trainer.loggers, SessionLogger(session)]

    # In place of Lightning's own methods.
    def fit(self, *arguments: Any, **options: Any) -> None:
        """Train from where the run stands, as if that were a checkpoint of Lightning's."""
        if self.restored:
            arguments, options["ckpt_path"] = arguments[:4], STATE
        self.own["fit"](*arguments, **options)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """What the session kept; the weights stay as they are until it restores them."""
        if path != STATE:
            return self.own["load_checkpoint"](path, *arguments, **options)
        return {**self.restored, WEIGHTS: self.trainer.lightning_module.state_dict()}

    def _prepare_dataloader(self, dataloader: Any, shuffle: bool, mode: Any) -> Any:
        """For the training, the session's batches of the same dataset."""
        if mode != RunningStage.TRAINING:
            return self.own["_prepare_dataloader"](dataloader, shuffle=shuffle, mode=mode)
        if self.loader is not None:
            raise JobError("train_dataloader", "several loaders", "have an order each", "Make one dataset of them")
        accumulate = self.trainer.accumulate_grad_batches
        shuffle = _is_shuffled(dataloader)
        given = dataloader.batch_size * self.session.world_size * accumulate
        self.batch_size = self.batch_size or given
        say_if_changed(self.session, given, self.batch_size)
        self.loader = SessionLoader(
            self.session, dataloader.dataset, dataloader, self.batch_size, accumulate, shuffle, self._limits
        )
        return self.loader

    def _limits(self) -> dict[str, int]:
        """How long the training is; steps are Lightning's affair, which counts those of each optimizer."""
        epochs = self.trainer.max_epochs
        return {"epochs": sys.maxsize if epochs is None or epochs < 0 else epochs}

    def reset(self) -> None:
        """Begin an epoch, or go on in it: from here on the loops are as they were, not as after a restart.

        They would leave out an update of a scheduler, or do one twice.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a loader that cannot go on where it was, as ours does
            self.own["reset"]()
        loops: Any = self.trainer.fit_loop
        loops._restarting = loops.epoch_loop._restarting = False

    def register_signal_handlers(self) -> None:
        """The session has handlers."""

    # Callbacks.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is on its device now, and in torch's wrapper."""
        model = trainer.strategy.model
        assert model is not None
        settle(model)
        self.session.track(model=pl_module)
        trainer.should_stop = self.done

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation that only tried whether it works is over."""
        trainer.callback_metrics.update(self.metrics)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A backward pass comes."""
        assert self.loader is not None
        self.weight = self.loader.weigh(trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update, or a part of one, is done."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:  # a module that optimizes by itself need not tell
            return
        self.loss = self.loss + loss * self.weight / trainer.accumulate_grad_batches
        if self.session.updates:
            self.session.log(loss=self.loss)
            self.loss = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`checkpoint.best` may name one of these."""
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.session.measured(self.session.parallel.share(metrics))  # ranks may have measured different things

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last update is over."""
        self.done = trainer.should_stop
        if self.loader is not None:
            self.loader.close()


class Kept:
    """What a session keeps of a trainer."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    def state_dict(self) -> dict[str, Any]:
        """All that Lightning would write into a checkpoint, but the weights and what the script says."""
        attached = self.attached
        everything = attached.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # without a file
        parts = {name: part for name, part in everything.items() if not LEFT_OUT & {name, *name.split("_")}}
        return {
            "batch_size": attached.batch_size, "done": attached.done, "parts": parts,
            # Private, because the public name computes them, with collectives, and not all ranks call this.
            "metrics": dict(attached.trainer._logger_connector._callback_metrics),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what an earlier start kept."""
        attached = self.attached
        attached.batch_size, attached.done, attached.restored = state["batch_size"], state["done"], state["parts"]
        attached.metrics = state["metrics"]


class SessionLogger(Logger):
    """Writes what a module logs into the metrics of the run folder."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    @property
    def name(self) -> str:
        """Lightning names folders by it."""
        return "muster"

    @property
    def version(self) -> str:
        """Lightning names folders by it."""
        return self.session.run.name

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers."""
        position = self.session.position
        self.session.report.log(replace(position, step=position.step if step is None else step + 1), metrics)

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """The job says them."""


def _is_shuffled(loader: Any) -> bool:
    """Whether a loader draws samples at random. Raises JobError: a session could not give them in its order."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        problem, remedy = "has an order of its own", "Give DataLoader(dataset, batch_size=..., shuffle=...)"
        raise JobError("train_dataloader", type(loader).__name__, problem, remedy)
    if loader.drop_last:
        raise JobError("train_dataloader", "drop_last=True", "would leave samples out", "Remove it")
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset) or isinstance(sampler, SequentialSampler):
        return False
    if isinstance(sampler, DistributedSampler):
        return sampler.shuffle
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        return True
    raise JobError("train_dataloader", type(sampler).__name__, "has an order of its own", "Use shuffle=True")
