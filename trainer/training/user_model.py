"""The model that `Task.model` returns: refused, or made ready to train. In which modes, and what is said about them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Job
from trainer.errors import JobError, some_of
from trainer.parallel.module_state import is_dense, put_buffer, saved_buffers
from trainer.task import Task
from trainer.training.optimizer import gives_sparse_gradients

HALF = (torch.float16, torch.bfloat16)


def take_model(model: Any, job: Job, device: torch.device) -> tuple[nn.Module, list[str]]:
    """The model on its device, in the job's number format and memory layout; notes for the user.

    Raises JobError: it cannot be trained.
    """
    _check(model, device)
    kind = type(model).__name__
    try:
        model = model.to(device)
        trains = {name: part.training for name, part in model.named_modules()}
        model.train()
    except (NotImplementedError, TypeError, ValueError) as error:  # quantized models, exported programs
        problem = f"cannot be moved to {device} and trained: {error}"
        raise JobError("task.model", kind, problem, "Return a model that can") from error
    if job.train.precision == "float64":
        model = model.double()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.complex64:  # which torch leaves as they are
                tensor.data = tensor.data.to(torch.complex128)
    _lay_out(model, job.train.channels_last)
    _check_state(model)
    _check_sparse(model, job)
    return model, [*_set_modes(model, trains), *_check_halves(model, job)]


def weights_beside(task: Task, model: nn.Module) -> list[str]:
    """A note for each module of the task that looks as if it was to be trained, and is no part of the model."""
    own = {id(parameter) for parameter in model.parameters()}
    notes = []
    for name, value in vars(task).items():
        parameters = list(value.parameters()) if isinstance(value, nn.Module) else []
        if any(weight.requires_grad and id(weight) not in own for weight in parameters):
            notes.append(
                f"task.{name} has weights that are no part of the model: they are not trained, saved or moved to the "
                f"device. Put it into the model, or call task.{name}.requires_grad_(False)"
            )
    return notes


def check_weights(model: nn.Module, trained: Sequence[Tensor]) -> None:
    """Refuse weights that a forward pass made. Raises JobError: they are not among those that are `trained`."""
    new = _others(model, trained)
    if new:
        problem = "the forward pass makes these weights, too late for the optimizer"
        remedy = "Call the model once on a batch in Task.model, before you return it"
        raise JobError("task.model", some_of(new), problem, remedy)


def unfrozen_weights(model: nn.Module, trained: Sequence[Tensor]) -> str:
    """A note if weights ask for gradients that are not among those that are `trained`, else nothing."""
    new = _others(model, trained)
    text = (
        f"{some_of(new)} got requires_grad=True after the start, too late for the optimizer: they do not "
        "learn. Leave it on from the start, or go on in a new run with checkpoint.load"
    )
    return text if new else ""


def differing_weights(names: list[str]) -> str:
    """A note if ranks hold different values of the weights with these names, else nothing."""
    text = (
        f"the ranks hold different values of {some_of(names)}: something beside the optimizer writes to them, "
        "with values that each rank computes from its own samples. Set them in Task.model, or average these values "
        "with torch.distributed first"
    )
    return text if names else ""


def _others(model: nn.Module, trained: Sequence[Tensor]) -> list[str]:
    known = set(map(id, trained))
    return [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in known]


def check_gradients(model: nn.Module, trained: Sequence[Tensor]) -> str:
    """A note if the first backward pass left out some weights of those that are `trained`, else nothing.

    Raises JobError: as `check_weights`.
    """
    check_weights(model, trained)
    here = [(name, weight) for name, weight in model.named_parameters() if not weight.is_meta]
    unused = [name for name, weight in here if weight.requires_grad and weight.grad is None]
    text = (
        f"no gradient reached {some_of(unused)} in the first step: they do not learn from it. If that is not "
        "meant, look for detach(), no_grad() and checkpoint(..., use_reentrant=True) on the way to the loss"
    )
    return text if unused else ""


def _check(model: Any, device: torch.device) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise JobError("task.model", kind, "is not a torch.nn.Module", "Return the model alone")
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise JobError("task.model", kind, "wraps the model already", "Return the model itself: `parallel` wraps it")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(value):
            remedy = "Call the model once on a batch before you return it: then its layers know their sizes"
            raise JobError("task.model", name, "has no size yet (a lazy layer)", remedy)
        if value.is_inference():
            raise JobError("task.model", name, "was made in inference mode", "Leave torch.inference_mode() before")
        if value.is_meta and device.type != "meta":
            remedy = "Build it outside of torch.device('meta'), or give it its weights before you return it"
            raise JobError("task.model", name, "is on the meta device: it has no values", remedy)


def _lay_out(model: nn.Module, channels_last: bool) -> None:
    """Give buffers memory of their own, which cannot be written otherwise, and 4-d tensors the layout of the job."""
    saved = saved_buffers(model)
    for name, buffer in model.named_buffers():
        if is_dense(buffer) and 0 in buffer.stride() and buffer.numel():  # such as position_ids.expand(8, -1)
            put_buffer(model, name, buffer.clone(memory_format=torch.contiguous_format), name in saved)
    if channels_last:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4 and is_dense(tensor):  # torch's own `to` refuses a model that has 5-d weights as well
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _check_state(model: nn.Module) -> None:
    """Load what the model calls its state, as a resumed run will."""
    try:
        model.load_state_dict(model.state_dict())
    except Exception as error:
        problem = f"its state dict cannot be loaded again: {' '.join(str(error).split())[:300]}"
        remedy = "Let state_dict return all that load_state_dict needs"
        raise JobError("task.model", type(model).__name__, problem, remedy) from error


def _set_modes(model: nn.Module, trains: dict[str, bool]) -> list[str]:
    """Training mode, except for the parts that `Task.model` or their own `train` put into evaluation mode.

    `trains`: which were in training mode before the `train` of the whole model.
    """
    parts = dict(model.named_modules())
    if not any(trains.values()):
        return [
            "model() returned the model in evaluation mode, as from_pretrained does. It trains in training mode. To "
            "keep parts of it, such as batch norms, in evaluation mode, call .train() on the model and .eval() on them"
        ]
    for name, part in parts.items():
        part.training = part.training and trains[name]
    calm = {name for name, part in parts.items() if not any(inner.training for inner in part.modules())}
    stay = [name for name in parts if name in calm and name.rpartition(".")[0] not in calm]  # without their inner parts
    if not stay:
        return []
    shown = some_of([f"{name} ({type(parts[name]).__name__})" for name in stay])
    return [f"these parts stay in evaluation mode, as you set them: {shown}"]


def _check_sparse(model: nn.Module, job: Job) -> None:
    """Refuse what cannot use the gradients of embeddings that have sparse ones."""
    name = next((name for name, part in model.named_modules() if gives_sparse_gradients(part)), None)
    if name is None:
        return
    problem, remedy = f"does not take the sparse gradients of {name}", "Set sparse=False there"
    if job.parallel == "fsdp":
        raise JobError("parallel", "fsdp", problem, f"{remedy}, or use parallel=ddp")
    if job.train.optimizer in ("adam", "adamw"):
        raise JobError("train.optimizer", job.train.optimizer, problem, f"{remedy}, or use sgd")
    if job.train.clip_norm is not None:
        raise JobError("train.clip_norm", job.train.clip_norm, problem, f"{remedy}, or remove the key")
    if job.train.weight_decay:
        raise JobError("train.weight_decay", job.train.weight_decay, problem, f"{remedy}, or set it to 0")


def _check_halves(model: nn.Module, job: Job) -> list[str]:
    """Refuse what cannot work with trainable weights of 16 bits, or advise against them."""
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF), None)
    if half is None:
        return []
    name, remedy = str(half).removeprefix("torch."), "Return model.float() from Task.model"
    if job.train.precision == "fp16" and half == torch.float16:
        problem = "scales the gradients of float32 weights, but these are float16"
        raise JobError("train.precision", "fp16", problem, remedy)
    if job.train.ema_decay is not None:
        problem = f"the weights are {name}, in which so small a share of an update is lost"
        raise JobError("train.ema_decay", job.train.ema_decay, problem, remedy)
    return [
        f"the weights are {name}: updates below their 3 digits are lost. {remedy}, and set train.precision=bf16 to "
        "compute in 16 bits"
    ]
