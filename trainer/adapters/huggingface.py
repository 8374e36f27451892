"""`muster.huggingface.attach(trainer, session)`: Hugging Face's `Trainer` on a session.

Its loop, arguments, callbacks, evaluation and log stay its own. The session gives it batches in the exact order, keeps
its state beside those of model, optimizer and scheduler, and restores all of them where the run goes on.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from trainer.adapters.loader import SessionLoader, refuse_settings, say_if_changed
from trainer.parallel.wrapping import settle
from trainer.training.session import Session

STATE = "trainer_state.json"
"""The file of a checkpoint of Hugging Face's that says how far the training is."""
SPEEDS = ("_runtime", "_per_second")
"""How names of metrics end that say how long an evaluation took."""


def attach(trainer: Trainer, session: Session) -> None:
    """Let a trainer train on a session. Call it once, before `trainer.train()`.

    The global batch is what the trainer's arguments say when the run begins, and stays so when the run goes on with
    more or fewer processes. Raises JobError: the trainer does what a session could not repeat.
    """
    _check(trainer, session)
    Attached(trainer, session)


def _check(trainer: Trainer, session: Session) -> None:
    args = trainer.args
    sampling = getattr(args, "train_sampling_strategy", "random")
    refuse_settings("TrainingArguments", (
        ("n_gpu", args.n_gpu, args.n_gpu > 1, "one process would use several GPUs", "Set devices_per_node in the job"),
        ("world_size", args.world_size, args.world_size != session.world_size,
         f"the session has {session.world_size}", "Make TrainingArguments inside of `with muster.Session()`"),
        ("device", str(args.device), args.device.type != session.device.type,
         f"the session is on {session.device.type}", "Set use_cpu in TrainingArguments, or device in the job"),
        ("fsdp", True, trainer.is_fsdp_enabled, "splits what a session keeps whole", "Remove it"),
        ("deepspeed", True, trainer.is_deepspeed_enabled, "splits what a session keeps whole", "Remove it"),
        ("auto_find_batch_size", True, args.auto_find_batch_size, "would change the global batch", "Remove it"),
        ("train_sampling_strategy", sampling, sampling not in ("random", "sequential"),
         "is an order of its own", "Remove it"),
        ("dataloader_drop_last", True, args.dataloader_drop_last, "would leave samples out", "Remove it"),
    ))  # fmt: skip


class Attached(TrainerCallback):
    """What is between a trainer and its session: the trainer calls it as a callback, and in place of three methods."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self.trainer, self.session = trainer, session
        self.restored: dict[str, Any] = {}
        """What the trainer knew where the run goes on."""
        self.done = False
        """Whether the training has come to an early end."""
        self.loader: SessionLoader | None = None
        self.loss: Any = 0.0
        args = trainer.args
        given = self.batch_size = args.train_batch_size * session.world_size * args.gradient_accumulation_steps
        session.track(trainer=self)
        say_if_changed(session, given, self.batch_size)
        args.restore_callback_states_from_checkpoint = True
        names = ("train", "get_train_dataloader", "training_step")
        self.own: Any = {name: getattr(trainer, name) for name in names}
        for name in names:
            setattr(trainer, name, getattr(self, name))
        trainer.add_callback(self)

    # What the session keeps.
    def state_dict(self) -> dict[str, Any]:
        """What a trainer knows beside model, optimizer and scheduler."""
        trainer = self.trainer
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        exportable: Any = [each for each in callbacks if isinstance(each, ExportableState)]
        known = {item.name: getattr(trainer.state, item.name) for item in fields(TrainerState)}
        known["stateful_callbacks"] = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        return {"batch_size": self.batch_size, "done": self.done, "state": known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what an earlier start kept."""
        self.batch_size, self.done, self.restored = state["batch_size"], state["done"], state["state"]

    # In place of the trainer's own methods.
    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train from where the run stands, as if that were a checkpoint of Hugging Face's that says so."""
        trainer: Any = self.trainer
        if not self.restored:
            return self.own["train"](*arguments, **options)
        trainer._load_from_checkpoint = lambda *_, **__: None  # private, and called for the weights, which are ours
        with tempfile.TemporaryDirectory() as folder:
            TrainerState(**self.restored).save_to_json(str(Path(folder) / STATE))
            return self.own["train"](*arguments[1:], **{**options, "resume_from_checkpoint": folder})

    def get_train_dataloader(self) -> SessionLoader:
        """The session's batches, of the trainer's dataset and collator."""
        args, given = self.trainer.args, self.own["get_train_dataloader"]()
        shuffle = getattr(args, "train_sampling_strategy", "random") == "random"  # a stream has no other order anyway
        dataset = given.dataset
        if type(dataset).__name__ == "IterableDatasetShard":  # accelerate's: a part of each batch for each process
            dataset = dataset.dataset
        accumulate, session = args.gradient_accumulation_steps, self.session
        self.loader = SessionLoader(session, dataset, given, self.batch_size, accumulate, shuffle, self._limits)
        return self.loader

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own, with the weight that the share of this rank has in the global batch."""
        assert self.loader is not None
        trainer: Any = self.trainer
        counted = trainer.compute_loss_func or (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None)
        weight = self.loader.weigh(0 if counted else trainer.current_gradient_accumulation_steps)
        loss: Tensor = self.own["training_step"](model, inputs, num_items_in_batch)
        self.loss = self.loss + loss * weight
        if not self.loader.waiting:
            self.session.log(loss=self.loss)
            self.loss = 0.0
        return loss

    def _limits(self) -> dict[str, int]:
        """A training that ended early is not begun again."""
        return {"steps": 0 if self.done else self.trainer.state.max_steps}

    # Callbacks.
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All objects are there now, and in torch's wrappers."""
        trainer: Any = self.trainer
        settle(trainer.model_wrapped)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in that of accelerate
        objects = {
            "model": trainer.model, "optimizer": optimizer, "lr_scheduler": trainer.lr_scheduler,
            "scaler": trainer.accelerator.scaler,
        }  # fmt: skip
        self.session.track(**{name: item for name, item in objects.items() if item is not None})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """A training that ended early is not begun again."""
        control.should_training_stop = control.should_training_stop or self.done
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the trainer's own numbers in the run folder, too."""
        numbers = _numbers(logs)
        if not any(name.startswith("eval_") for name in numbers):  # those come again
            self.session.report.log(replace(self.session.position, step=state.global_step), numbers)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """`checkpoint.best` may name one of these."""
        numbers = _numbers(metrics).items()
        self.session.measured({name: value for name, value in numbers if not name.endswith(SPEEDS)})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last update is over."""
        self.done = self.trainer.state.global_step < self.trainer.state.max_steps
        if self.loader is not None:
            self.loader.close()


def _numbers(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (values or {}).items() if isinstance(value, (int, float))}


def _leave_in_place(skip: Any) -> Any:
    """A session's loader begins where the training stands: there is nothing to skip."""
    return lambda loader, count=0: loader if isinstance(loader, SessionLoader) else skip(loader, count)


_module: Any = sys.modules[Trainer.__module__]  # its loop looks this up by name
_module.skip_first_batches = _leave_in_place(_module.skip_first_batches)
