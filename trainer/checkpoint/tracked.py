"""Named objects of a training, as a checkpoint holds them: whatever has `state_dict` and `load_state_dict`.

Of a module there is more to keep than its state dict says: buffers that a forward pass made, numbers that it counted.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from trainer.checkpoint.weights import fit
from trainer.errors import JobError
from trainer.parallel.module_state import (
    buffers_beside,
    changed_numbers,
    is_dense,
    numbers,
    restore_buffers,
    restore_numbers,
)

Entry = dict[str, Any]
"""What a checkpoint holds of one object."""
MODEL = "model"
"""The module whose weights are the file `model.pt`; without one of this name, those of all modules are, by name."""
WRONG = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What `load_state_dict` raises for the state of something else."""


def unwrap(item: Any) -> Any:
    """The module inside of wrappers for several devices, of torch and Fabric: a checkpoint fits any number of them."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(item, wrappers) or type(item).__name__ == "_FabricModule":
        item = item.module
    return item


class TrackedObjects:
    """Objects by their names, in the order in which they are restored."""

    def __init__(self, explain: Callable[[str, str, Exception], JobError]) -> None:
        """`explain` makes the error for an object that does not fit a checkpoint, from both names and the cause."""
        self.explain = explain
        self.objects: dict[str, Any] = {}
        self.numbers: dict[str, Any] = {}
        self.spread: Callable[[Any, Any], Any] = lambda item, state: state
        """See `Parallel.spread`."""

    def add(self, name: str, item: Any) -> None:
        """Keep an object from here on. What the parts of a module count is compared with what they count now."""
        item = unwrap(item)
        self.objects[name] = item
        if isinstance(item, nn.Module):
            self.numbers[name] = numbers(item)

    def has_buffers(self) -> bool:
        """Whether there is a buffer of which each rank has its own, such as batch statistics; sparse ones are alike."""
        modules = (item for item in self.objects.values() if isinstance(item, nn.Module))
        return any(is_dense(buffer) for module in modules for buffer in module.buffers())

    def dump(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        """The contents of `model.pt`, and an entry for each object."""
        entries = {name: self._dump(name, item) for name, item in self.objects.items()}
        weights = {name: entry.pop("weights") for name, entry in entries.items() if self._is_weights(name, entry)}
        return weights.get(MODEL, weights), entries

    def _dump(self, name: str, item: Any) -> Entry:
        if not isinstance(item, nn.Module):
            return {"state": item.state_dict()}
        counted = changed_numbers(item, self.numbers[name])
        return {"weights": item.state_dict(), "buffers": buffers_beside(item), "numbers": counted}

    def _is_weights(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether an entry's weights are in `model.pt`."""
        has_model = isinstance(self.objects.get(MODEL), nn.Module)
        return name == MODEL if has_model else "weights" in entry

    def restore(self, name: str, weights: Mapping[str, Any], entry: Entry, origin: str) -> None:
        """Give an object the state that it had. Raises JobError: it is something else now."""
        item = self.objects[name]
        try:
            if isinstance(item, nn.Module):
                own = entry["weights"] if "weights" in entry else weights if name == MODEL else weights[name]
                self._restore_module(item, own, entry)
            else:
                item.load_state_dict(self.spread(item, entry["state"]))
        except WRONG as error:
            raise self.explain(name, origin, error) from None

    def _restore_module(self, module: nn.Module, weights: Any, entry: Entry) -> None:
        restore_buffers(module, weights, entry["buffers"])
        restore_numbers(module, entry["numbers"])
        try:
            module.load_state_dict(self.spread(module, weights))
        except RuntimeError:
            fitting, misfits = fit(weights, module)  # a wrapper, such as a compiled model's, may have come or gone
            if misfits:
                raise
            module.load_state_dict(self.spread(module, fitting), strict=False)


def entries_of(state: dict[str, Any]) -> dict[str, Entry]:
    """The entries in a checkpoint's `state.pt`, also of one that was saved when only tasks had any."""
    if "objects" in state:
        return dict(state["objects"])
    beside = state.get("buffers", {"saved": [], "others": {}})  # the first checkpoints say nothing of them
    entries: dict[str, Entry] = {
        MODEL: {"buffers": beside, "numbers": state.get("numbers", {})}, "optimizer": {"state": state["optimizer"]},
    }  # fmt: skip
    if state["scaler"]:
        entries["scaler"] = {"state": state["scaler"]}
    if state["average"]:
        entries["average"] = {"state": {**state["average"], "buffers": beside}}
    return entries
