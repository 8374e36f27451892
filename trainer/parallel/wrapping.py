"""Modules of a script under DDP: wrapped, and their gradients weighted, so that uneven shares count right."""

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.data.nested import map_tensors
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import evaluation_mode
from trainer.parallel.shards import part_of
from trainer.parallel.units import find_units


def wrap_module(module: nn.Module, parallel: Parallel, options: dict[str, Any]) -> nn.Module:
    """The module on this rank's device, under DDP where there are ranks and weights to train; `options` are DDP's."""
    if isinstance(module, DistributedDataParallel):
        settle(module)
        return module
    module = module.to(parallel.device)
    if parallel.world_size == 1 or not any(weight.requires_grad for weight in module.parameters()):
        return module
    devices = [parallel.device] if parallel.cuda else None
    ddp = DistributedDataParallel(module, device_ids=devices, **{"gradient_as_bucket_view": True, **options})
    settle(ddp)
    return ddp


def shard_module(
    module: nn.Module, parallel: Parallel, layers: Iterable[nn.Module] | None, gradients: "Gradients"
) -> nn.Module:  # fmt: skip
    """The module, sharded (`trainer.parallel.fsdp`); its gradients weigh as those of others do.

    They come from what is called, so what it returns weighs them: no hook of a weight is called in shards. The caller
    gets tensors of its own: a hook of what the model made would also weigh what passes on the way between two of them.
    """
    sharder: Any = parallel
    module = module.to("cpu")
    sharder.shard_module(module, module, find_units(module, layers, parallel.job.fsdp.min_params, "session.wrap"))
    apply: Any = Weigh.apply

    def weigh(tensor: Tensor) -> Tensor:
        return apply(tensor, gradients) if tensor.requires_grad else tensor

    module.register_forward_hook(lambda _module, _given, output: map_tensors(output, weigh))
    return module


class Weigh(torch.autograd.Function):
    """The same tensor; the gradients that come back through it are weighed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradients: "Gradients") -> Tensor:
        """Detached, because autograd lets nobody change a view that is made here, and a script may."""
        ctx.gradients = gradients
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """As much of the gradient as counts."""
        return ctx.gradients.weigh(grads[0]), None


def settle(module: nn.Module) -> None:
    """Let each DDP in a module arrange itself before the first step: see `settle_buckets`."""
    for part in parts_under_ddp(module):
        if not (part.static_graph or part.find_unused_parameters):
            settle_buckets(part)


def parts_under_ddp(module: nn.Module) -> list[DistributedDataParallel]:
    """A module, or those inside of it, such as of a wrapper of Fabric's."""
    return [part for part in module.modules() if isinstance(part, DistributedDataParallel)]


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP choose its gradient buckets now, by a backward pass of zeros through all weights.

    It reorders them once after its first step. With more than two ranks the place of an element in its bucket decides
    in which order the ranks' values are added, so the last bits of the first step after a restart would differ.
    """
    module = ddp.module
    own = vars(module).get("forward")  # somebody may have replaced it
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    module.forward = lambda: [weight.reshape(-1)[:1].sum() for weight in weights]
    try:
        outputs = ddp()
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    for weight in weights:
        weight.grad = None


class Gradients:
    """Weighs what backward passes add to the gradients of some modules, and says when DDP averages them."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.factor = 1.0
        self.weights: dict[int, Tensor] = {}
        self.hooks: dict[int, Any] = {}
        """By the ids of the weights."""

    def add(self, module: nn.Module) -> None:
        """Care for a module's gradients, too."""
        for part in (module, *parts_under_ddp(module)):
            if all(part is not known for known in self.modules):
                self.modules.append(part)
                self.weights = {}

    def set(self, factor: float, last: bool) -> None:
        """The next backward pass counts `factor` times; DDP averages after it if it is the `last` of its update."""
        for module in self.modules:
            if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync != last:
                module.require_backward_grad_sync = last
        self.factor = factor
        if factor == 1.0:
            for hook in self.hooks.values():
                hook.remove()
            self.hooks.clear()
        else:
            self._hook()

    def _hook(self) -> None:
        """Hook the weights that are trained now: a script may freeze some, or train them, as it goes on."""
        if not self.weights:
            weights = (weight for module in self.modules for weight in module.parameters())
            self.weights = {id(weight): weight for weight in weights if part_of(weight) is None}
        for key, weight in self.weights.items():
            if weight.requires_grad and key not in self.hooks:
                self.hooks[key] = weight.register_hook(self.weigh)

    def weigh(self, gradient: Tensor) -> Tensor:
        """A gradient, as much as it counts."""
        return gradient if self.factor == 1.0 else gradient * self.factor


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Any:
    """Evaluation mode without gradients, on each rank alone: DDP shares buffers before each forward pass otherwise."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in modules:
            stack.enter_context(evaluation_mode(module))
            if isinstance(module, DistributedDataParallel):
                stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
                module.require_forward_param_sync = False
            for part in module.modules():
                reshard: Any = getattr(part, "reshard", None)
                if reshard is not None:  # of a sharded one, which waits for a backward pass
                    stack.callback(reshard)
        yield
