"""What goes around a public call of torch because that call costs at least 2 % of a step of 3 ms on a CPU.

Each has the public call as its fallback. Here stands what reaches into torch, and nothing else does so for speed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

KINDS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def make_step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """What to call for an update: `optimizer.step`, or what is inside its wrappers.

    torch wraps the step of its own optimizers for hooks, for traces and for its compiler: 4 % of a step of 3 ms. Hooks
    for all optimizers are looked for; nobody but the loop has this optimizer, so it has none of its own.
    """
    pre_hooks, post_hooks = map(list_hooks, (register_optimizer_step_pre_hook, register_optimizer_step_post_hook))
    kind: Any = type(optimizer)
    wrapped: Any = getattr(getattr(kind.step, "__wrapped__", None), "__wrapped__", None)
    if kind not in KINDS or wrapped is None or pre_hooks or post_hooks:
        return optimizer.step

    def step() -> None:
        with torch.no_grad():
            wrapped(optimizer)

    return step


def list_hooks(register: Callable[[Any], Any]) -> Any:
    """The hooks that were registered with one of torch's functions. A handle of our own leads to them."""
    handle = register(print)
    handle.remove()
    return handle.hooks_dict_ref()


run_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def run_backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """As `torch.autograd.backward`, for gradients of the outputs' shapes.

    Before it calls the engine, torch compares symbolic shapes in Python: 20 microseconds, and 100 in a rank that has
    just waited for another. The engine refuses a shape that does not fit anyway. A subclass may have a way of its own.
    """
    if run_engine is None or type(outputs[0]) is not Tensor:
        torch.autograd.backward(outputs, gradients)
    else:
        run_engine(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
