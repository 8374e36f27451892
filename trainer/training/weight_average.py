"""The moving average of the weights that `train.ema_decay` asks for."""

import copy
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.errors import JobError
from trainer.parallel.module_state import buffers_beside, is_dense, put_buffer, restore_buffers, saved_buffers


class WeightAverage:
    """An exponential moving average of the weights; buffers are the newest, so that they fit the newest weights.

    As torch's AveragedModel, which however copies a counter to the GPU, for which each step would wait, and knows
    neither buffers that a forward pass makes nor sparse ones.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: the share of the average that each update keeps; the first update takes the weights as they are.

        Raises JobError: the model cannot be copied.
        """
        # What weight_norm and the like computed in the last forward pass cannot be copied; the next one makes it anew.
        computed = {
            id(value): value.detach().clone()
            for part in model.modules() for value in vars(part).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }  # fmt: skip
        sparse = {id(buffer): buffer for buffer in model.buffers() if not is_dense(buffer)}  # both have the same
        try:
            self.module = copy.deepcopy(model, computed | sparse)
        except Exception as error:
            problem = f"the model cannot be copied for its average: {type(error).__name__}: {error}"
            remedy = "Keep such things outside of the model, or remove the key"
            raise JobError("train.ema_decay", decay, problem, remedy) from error
        name = bound_forward(model)
        if name is not None:
            problem = (
                f"the forward of {name or 'the model'} is a function that holds the model: an average would use it"
            )
            raise JobError("train.ema_decay", decay, problem, "Define forward in a class, or remove the key")
        self.n_averaged = torch.tensor(0)
        self.mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards the weights of `model`."""
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        mixed = [pair for pair in pairs if mixes(pair[0])] if self.n_averaged else []
        if mixed:
            self.mix([average for average, _ in mixed], [weight for _, weight in mixed], self.n_averaged)
        if len(mixed) < len(pairs):
            for average, weight in pairs:
                if not (mixed and mixes(average)):
                    average.copy_(weight)
        self._take_buffers(model)
        self.n_averaged += 1

    def state_dict(self) -> dict[str, Any]:
        """What to keep of it: see `buffers_beside`."""
        return {
            "model": self.module.state_dict(), "updates": self.n_averaged, "buffers": buffers_beside(self.module),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what was kept. Raises RuntimeError: of another model."""
        restore_buffers(self.module, state["model"], state["buffers"])
        self.module.load_state_dict(state["model"])
        self.n_averaged.copy_(state["updates"])

    def _take_buffers(self, model: nn.Module) -> None:
        own = dict(self.module.named_buffers())
        for name, new in model.named_buffers():
            old = own.get(name)
            if old is new:
                continue
            if old is not None and is_dense(new) and is_dense(old) and (old.shape, old.dtype) == (new.shape, new.dtype):
                old.copy_(new)
            else:  # a forward pass made it, or it is sparse: then both have the same one
                put_buffer(self.module, name, new.clone() if is_dense(new) else new, name in saved_buffers(model))


def bound_forward(model: nn.Module) -> str | None:
    """The part whose forward was replaced by a function with parts or weights of the model in it: a copy keeps it."""
    own = {id(value) for value in (*model.modules(), *model.parameters())}
    for name, part in model.named_modules():
        forward = vars(part).get("forward")
        cells = (forward.__closure__ or ()) if isinstance(forward, FunctionType) else ()
        held = [cell.cell_contents for cell in cells]
        if any(id(getattr(value, "__self__", value)) in own for value in held):  # or a method of one
            return str(name)
    return None


def mixes(parameter: Tensor) -> bool:
    """Whether a parameter has a mean: frozen ones may be integers."""
    return parameter.is_floating_point() or parameter.is_complex()
