"""Weights of any origin: found, renamed as the model names them, fitted, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from states import difference
from torch import nn
from torch.optim.swa_utils import AveragedModel

from trainer.checkpoint.files import DamagedCheckpoint, commit
from trainer.checkpoint.safetensors import write
from trainer.checkpoint.weights import fit, load_weights, rename, start_from
from trainer.errors import JobError


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, classes))


class Wrapper(nn.Module):
    """A backbone in a user's class."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = net(), nn.Linear(3, 2)


def start(model: nn.Module, state: Any, folder: Path, strict: bool = True) -> str:
    torch.save(state, folder / "theirs.pt")
    said: list[str] = []
    start_from(model, folder / "theirs.pt", strict, said.append)
    return " | ".join(said)


def equal(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.encoder.0."])
def test_a_prefix_that_makes_all_names_fit_is_removed(tmp_path: Path, prefix: str) -> None:
    theirs, model = net(), net()
    start(model, {"epoch": 3, "state_dict": {prefix + k: v for k, v in theirs.state_dict().items()}}, tmp_path)
    assert equal(model, theirs)


def test_a_part_that_was_compiled_has_its_usual_names(tmp_path: Path) -> None:
    theirs, model = Wrapper(), Wrapper()
    state = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in theirs.state_dict().items()}
    start(model, state, tmp_path)
    assert equal(model, theirs)


def test_wrappers_on_the_models_side(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

    theirs, model = net(), Own()
    start(model, theirs.state_dict(), tmp_path)  # its name begins with a prefix that theirs lacks
    assert equal(model.module, theirs)
    other = Own()
    start(other, model.state_dict(), tmp_path)
    assert equal(other, model)
    compiled: Any = torch.compile(net())
    start(compiled, theirs.state_dict(), tmp_path)
    assert equal(compiled._orig_mod, theirs)


@pytest.mark.parametrize("container", ["model", "model_state_dict", "module", "net", "params"])
def test_what_was_saved_with_other_things(tmp_path: Path, container: str) -> None:
    theirs, model = net(), net()
    start(model, {"optimizer": {"state": {}}, container: theirs.state_dict(), "step": 7}, tmp_path)
    assert equal(model, theirs)
    start(model, {"epoch": 1, **net().state_dict()}, tmp_path)  # numbers among the weights
    assert not equal(model, theirs)


def test_weights_that_do_not_fit_are_listed_or_left_out(tmp_path: Path) -> None:
    theirs, model = net(5), net()
    state = {**theirs.state_dict(), "extra": torch.ones(1)}
    del state["0.bias"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(JobError) as caught:
        start(model, state, tmp_path)
    message = str(caught.value)
    assert message.startswith("checkpoint.load=") and "Set checkpoint.strict=false" in message
    assert "it lacks 0.bias; the model has no extra; of another shape" in message
    assert "2.weight (5, 16) not (3, 16), 2.bias (5,) not (3,)" in message
    told = start(model, state, tmp_path, strict=False)
    assert "6 weights fit and are taken" in told  # one, and five of the norm
    assert "| " in told and "2.weight (5, 16) not (3, 16)" in told
    assert torch.equal(model[0].weight, theirs[0].weight)
    for name in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_backbone_goes_where_it_belongs(tmp_path: Path) -> None:
    theirs, model = net(), Wrapper()
    with pytest.raises(JobError, match=r"it lacks head\.weight, head\.bias"):
        start(model, theirs.state_dict(), tmp_path)
    start(model, theirs.state_dict(), tmp_path, strict=False)
    assert equal(model.backbone, theirs)


def test_weights_of_something_else_are_refused_even_if_not_strict(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="Give weights of this model"):
        start(net(), {"a": torch.ones(1)}, tmp_path, strict=False)


def test_tied_weights_and_counters_of_old_files_may_be_missing(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Embedding(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    state = {name: value + 1 for name, value in model.state_dict().items()}
    expected = state["0.weight"].clone()
    del state["2.weight"], state["1.num_batches_tracked"]
    start(model, {"module." + name: value for name, value in state.items()}, tmp_path)
    assert torch.equal(model[2].weight, expected)


def test_an_average_of_torchs(tmp_path: Path) -> None:
    theirs, model = AveragedModel(net()), net()
    assert "the model has no n_averaged" in start(model, theirs.state_dict(), tmp_path, strict=False)
    assert equal(model, theirs.module)


def test_many_names_are_matched_quickly() -> None:
    names = [f"encoder.layer.{layer}.attention.self.query.{part}.weight" for layer in range(100) for part in range(20)]
    found, unknown = rename({f"model.{name}": name for name in names}, names)
    assert found == {name: name for name in names} and not unknown
    assert fit({}, net())[1]["it lacks"][:2] == ["0.weight", "0.bias"]


def test_folders(tmp_path: Path) -> None:
    theirs = net()
    weights = theirs.state_dict()
    run = tmp_path / "run"
    commit(run / "checkpoints", 3, {"model.pt": weights, "state.pt": {}}, {}, 0)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, names in enumerate((list(weights)[:2], list(weights)[2:])):
        torch.save({name: weights[name] for name in names}, shards / f"part-{number}.bin")
    places = {name: f"part-{int(number > 1)}.bin" for number, name in enumerate(weights)}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for folder in (run, run / "checkpoints/step-000000003", shards):
        found = load_weights(folder)
        assert set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(JobError, match="no such file"):
        load_weights(tmp_path)
    damaged = run / "checkpoints/step-000000003"
    content = bytearray((damaged / "model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "model.pt").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.pt.*bits have changed"):
        load_weights(damaged)


def test_safetensors_of_others_are_read(tmp_path: Path) -> None:
    """One file, or several with an index as Hugging Face writes them; what the package wrote, and what it can read."""
    package = pytest.importorskip("safetensors.torch")
    values = {"a.weight": torch.randn(3, 2), "a.count": torch.tensor(3), "b.weight": torch.randn(2).bfloat16()}
    package.save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    assert difference(load_weights(tmp_path), {name: values[name] for name in load_weights(tmp_path)}) == ""
    parts = tmp_path / "parts"
    parts.mkdir()
    files = {name: f"model-0000{1 + (name[0] == 'b')}-of-00002.safetensors" for name in values}
    for file in set(files.values()):
        with (parts / file).open("wb") as out:
            chosen = {name: value for name, value in values.items() if files[name] == file}
            write({name: ((value.dtype, tuple(value.shape)), [value]) for name, value in chosen.items()}, {}, out)
        assert difference(package.load_file(parts / file), chosen) == ""
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert difference({name: load_weights(parts)[name] for name in values}, values) == ""


@pytest.mark.parametrize("data", [b"", b"text", b"\xff" * 64, b"\x02" + bytes(7) + b"{]"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(JobError, match="cannot load it"):
        load_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content, problem", [
    (b"text", "torch cannot load it"), (b"", "torch cannot load it"), (None, "no such file"),
])  # fmt: skip
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "theirs.pt").write_bytes(content)
    with pytest.raises(JobError, match=problem) as caught:
        load_weights(tmp_path / "theirs.pt")
    assert caught.value.key == "checkpoint.load"


def test_a_pickled_model_is_no_state_dict(tmp_path: Path) -> None:
    for value, problem in ((net(), "torch cannot load it"), ([torch.ones(1)], "contains a list")):
        torch.save(value, tmp_path / "theirs.pt")
        with pytest.raises(JobError, match=problem):
            load_weights(tmp_path / "theirs.pt")
