"""One step's module: the model with the task's loss, which the modes replicate or wrap."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from trainer.errors import JobError
from trainer.parallel.returned import read_losses, read_metrics
from trainer.task import Task

COMPILER = ("torch._inductor", "torch._dynamo")
"""Where torch defines the errors of its compiler."""


class Step(nn.Module):
    """The model with the task's loss inside. Modes replicate or wrap it, and only per-sample values leave it."""

    def __init__(
        self, model: nn.Module, task: Task, autocast: Callable[[], Any] | None, compile: bool = False
    ) -> None:  # fmt: skip
        """`autocast` makes the context of a forward pass. It is entered here because each replica is a thread."""
        super().__init__()
        self.model = model
        self.task = task
        self.autocast = autocast or nullcontext
        self.calls_itself = type(task).output is not Task.output
        """Whether the task says how the model is called."""
        self.needs_gradients = False
        """Whether an evaluation must compute gradients: found out by `trainer.training.evaluation`."""
        self.apply_model = compile_call(apply_model) if compile else apply_model

    def forward(self, batch: Any, evaluate: bool = False) -> Any:
        """The losses, as `read_losses` gives them; when evaluating, a dict of them and the task's metrics."""
        with self.autocast():
            if self.calls_itself:
                output = self.apply_model(self.task.output, self.model, batch)
            else:
                output = self.apply_model(self.model, self.task.inputs(batch))
            losses = read_losses(self.task.loss(output, batch))
        if not evaluate:
            return losses
        count = len(losses) if losses.dim() == 1 else None
        return {"loss": losses, **read_metrics(self.task.metrics(output, batch), count, losses.device)}


def apply_model(function: Callable[..., Any], *arguments: Any) -> Any:
    """What is compiled. `model.compile()` silently does nothing for torch's own classes, such as Sequential."""
    return function(*arguments)


def compile_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled; the first calls compile. Raises JobError then: the compiler fails."""
    compiled = torch.compile(function)

    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith(COMPILER):
                raise
            first, *lines = str(error).strip().splitlines() or [type(error).__name__]
            details = [line.strip() for line in lines if "error:" in line.lower()]  # what a compiler says comes later
            problem = f"torch cannot compile the model: {'; '.join([first, *details[:1]])}"
            raise JobError("train.compile", True, problem, "Set it to false, or install what is missing") from error

    return call
