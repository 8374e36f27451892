"""Weights that a training starts from, whoever saved them: found in their file, and fitted to the model by name.

What a run of Muster saved for itself: `trainer.checkpoint.files`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from trainer.checkpoint.files import newest_good, read_weights, verify
from trainer.checkpoint.safetensors import Tensors
from trainer.errors import JobError, some_of
from trainer.parallel.shards import Part
from trainer.run.folder import RunFolder

KEY = "checkpoint.load"
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Under which others keep a state dict among other things; what counts is the first that is there."""
IN_FOLDERS = ("model.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
              "pytorch_model.bin.index.json")  # fmt: skip


def start_from(
    model: nn.Module, path: Path, strict: bool, say: Callable[[str], None],
    once: Callable[[Callable[[], Any]], Any] = lambda read: read(), spread: Callable[[Any], Any] = lambda state: state,
    shard: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Give `model` the weights in a `.pt` or `.safetensors` file, or in a checkpoint's or Hugging Face's folder.

    `once` has one rank read them for all; `spread`: see `Parallel.spread`. Of a model of which each rank has a `shard`,
    each reads its own, when one has verified them. Raises JobError: they cannot be read; they do not fit, and the job
    is `strict`, or nothing fits.
    """
    if shard is None:
        weights = once(lambda: load_weights(path))
    else:
        weights = read_found(Path(once(lambda: str(find(path)))), shard)
    try:
        model.load_state_dict(spread(weights))
        return
    except RuntimeError:
        fitting, misfits = fit(weights, model)
    if misfits and (strict or not fitting):
        found = "; ".join(f"{what} {some_of(names)}" for what, names in misfits.items())
        remedy = "Set checkpoint.strict=false to keep what fits" if fitting else "Give weights of this model"
        raise JobError(KEY, str(path), f"does not fit the model: {found}", remedy)
    model.load_state_dict(spread(fitting), strict=False)
    if misfits:
        say(f"{KEY}={path}: {len(fitting)} weights fit and are taken")
        for what, names in misfits.items():
            say(f"  {what} {', '.join(names)}")


def load_weights(path: Path) -> dict[str, Any]:
    """A state dict from a file or folder of any origin, verified where it can be.

    Raises JobError: not there, not a state dict.
    """
    return read_found(find(path))


def read_found(path: Path, shard: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """A state dict from a file or a checkpoint's folder, of which one of several ranks reads a part.

    Raises JobError: as `load_weights`.
    """
    try:
        state = read_weights(path, shard) if path.is_dir() else _read(path)
    except FileNotFoundError:
        raise JobError(KEY, str(path), "no such file", "Give a step-* folder or a .pt file") from None
    except JobError:
        raise
    except Exception as error:
        problem = f"torch cannot load it ({type(error).__name__})"
        remedy = "Save a state dict with torch.save(model.state_dict(), path)"
        raise JobError(KEY, str(path), problem, remedy) from error
    while isinstance(state, dict) and (inner := _inner(state)) is not None:
        state = inner
    if not isinstance(state, dict):
        problem = f"contains a {type(state).__name__}, not a state dict"
        raise JobError(KEY, str(path), problem, "Save one with torch.save(model.state_dict(), path)")
    return state


def find(folder: Path) -> Path:
    """The file, or the folder of a checkpoint, which is whole then."""
    if not folder.is_dir():
        return folder
    if (folder / "manifest.json").is_file():
        verify(folder)
        return folder
    if (run := RunFolder(folder)).checkpoints.is_dir() and (newest := newest_good(run.checkpoints)[0]) is not None:
        return newest
    return next((folder / name for name in IN_FOLDERS if (folder / name).is_file()), folder / IN_FOLDERS[0])


def _read(path: Path) -> Any:
    if path.name.endswith(".index.json"):  # of several files with a part each
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: value for part in parts for name, value in _read(path.with_name(part)).items()}
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    return dict(Tensors(path))


def _inner(state: dict[str, Any]) -> dict[str, Any] | None:
    """The state dict inside of what was saved together with other things."""
    named = [state[name] for name in CONTAINERS if isinstance(state.get(name), dict)]
    return named[0] if named else None


def fit(weights: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Those of the weights that the model takes, by its own names; what is wrong with which of the others."""
    own = model.state_dict(keep_vars=True)
    named, unknown = rename(weights, own)
    shapes = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in named.items()
        if isinstance(value, (Tensor, Part)) and isinstance(own[name], Tensor) and value.shape != own[name].shape
    }
    fitting = {name: value for name, value in named.items() if name not in shapes}
    given = {id(own[name]) for name in named}  # tied weights are given under one of their names
    missing = [
        name for name, value in own.items()
        if name not in named and id(value) not in given and not name.endswith("num_batches_tracked")
    ]  # fmt: skip
    others = [name for name in unknown if isinstance(weights[name], (Tensor, Part))]  # a file may hold numbers too
    misfits = {
        "it lacks": missing, "the model has no": others,
        "of another shape than the model's are": [f"{n} {theirs} not {ours}" for n, (theirs, ours) in shapes.items()],
    }  # fmt: skip
    return fitting, {what: names for what, names in misfits.items() if names}


def rename(weights: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Weights by the model's `names`, and those that have none.

    Wrappers and trainers put a prefix before all names (`module.`, `model.`), or the model is a part of another here:
    of all prefixes to remove or to add, the one under which most names are known. `_orig_mod.` (torch.compile) may
    stand anywhere.
    """
    given, own = ({name.replace("_orig_mod.", ""): name for name in some} for some in (weights, names))
    known: Counter[tuple[str, str]] = Counter({("", ""): 0})
    known.update((prefix, "") for name in given for prefix in prefixes(name) if name[len(prefix) :] in own)
    known.update(("", prefix) for name in own for prefix in prefixes(name)[1:] if name[len(prefix) :] in given)
    removed, added = max(known, key=lambda pair: (known[pair], -len(pair[0] + pair[1])))
    targets = {
        name: own.get(added + name[len(removed) :]) if name.startswith(removed) else None for name in given
    }  # fmt: skip
    found = {target: weights[given[name]] for name, target in targets.items() if target is not None}
    return found, [given[name] for name, target in targets.items() if target is None]


def prefixes(name: str) -> list[str]:
    """What may stand before the dots of a name: nothing, `a.`, `a.b.` of `a.b.c`."""
    parts = name.split(".")
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts))]
