"""Loading a job: defaults < job file < `key=value`, with every mistake refused by name.

A mistake is a `JobError` that says key, value and remedy; it is found before anything is started.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import values as grammar
from trainer.config.job import Job
from trainer.config.rules import check_job
from trainer.config.user_code import add_import_paths
from trainer.config.values import UNREADABLE, is_text_type, settle_keys
from trainer.errors import JobError, did_you_mean, wrong_choice

LIMITS = {
    "minimum": ("at least", operator.ge), "maximum": ("at most", operator.le),
    "above": ("more than", operator.gt), "below": ("less than", operator.lt),
}  # fmt: skip


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read the job file at `path`, apply `overrides` (`key=value`), check everything.

    Raises:
        JobError: unreadable file, unknown key, wrong type or range, contradicting settings.
    """
    return to_job(merge_job(path, overrides))


def merge_job(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge defaults, job file and overrides; interpolations such as `${oc.env:X}` stay unresolved."""
    path = Path(path)
    add_import_paths(path / "job.yaml" if path.is_dir() else path)
    written = settle_keys(_read_yaml(path), _is_text)
    given = parse_overrides(overrides)
    if given.get("parallel") == "single":  # one device is what single means: the file's counts step back
        for key in ("nodes", "devices_per_node"):
            if key not in given and "devices" not in given:
                written.pop(key, None)
        if "devices" not in given:
            written.pop("devices", None)
    config = OmegaConf.structured(Job)
    for source, values in ((str(path), written), ("the command line", given)):
        for key, value in _leaves(values):
            _check_key(key, value, source)
            _check_kind(key, value, source)
        try:
            config = OmegaConf.merge(config, expand_paths(values, Job))
        except OmegaConfBaseException as error:
            key = str(getattr(error, "full_key", None) or "?")
            value = _get(values, key)
            raise JobError(key, value, _first_line(error), f"It is set in {source}; {_expected(key)}") from None
    if not (given.get("name") or written.get("name")):
        config.name = path.resolve().parent.name if path.name == "job.yaml" else path.stem
    assert isinstance(config, DictConfig)
    return config


def to_job(config: DictConfig) -> Job:
    """Resolve and check a merged configuration."""
    try:
        job = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "?")
        raise JobError(key, "${...}", _first_line(error), "Set what the interpolation refers to") from None
    assert isinstance(job, Job)
    for name, item in valid_keys():
        value = functools.reduce(getattr, name.split("."), job)
        if value is not None:
            _check_limits(name, value, item.metadata)
    check_job(job)
    return job


def to_text(config: DictConfig) -> str:
    """The merged job as YAML. Interpolations stay as written, so a secret from the environment is never stored."""
    return OmegaConf.to_yaml(config, resolve=False)


def save_job(config: DictConfig, path: Path) -> None:
    """Write the merged job."""
    path.write_text(to_text(config))


def read_sections(path: Path, is_text: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """Read a YAML file of any kind into plain dictionaries; `is_text` says which keys are text, as written.

    Raises:
        JobError: not there, or not a mapping in YAML.
    """
    return settle_keys(_read_yaml(path, "file", "Write a mapping: one `key: value` a line"), is_text)


def expand_paths(values: dict[str, Any], kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """The values with `~` and `$NAME` replaced in those that the dataclass `kind` declares as paths."""
    paths = {name for name, item in valid_keys(kind) if item.metadata.get("path")}
    return {
        key: expand_paths(value, kind, f"{prefix}{key}.") if isinstance(value, dict)
        else grammar.expand_path(prefix + key, value) if isinstance(value, str) and prefix + key in paths else value
        for key, value in values.items()
    }  # fmt: skip


def _read_yaml(
    path: Path, what: str = "JOB", form: str = "A job file is a mapping: name, task, train, ..."
) -> dict[str, Any]:
    if path.is_dir():
        path = path / "job.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = map(str, sorted(path.parent.glob("*.yaml")))
        remedy = did_you_mean(path, others, f"Working directory: {os.getcwd()}", 0.3)
        raise JobError(what, str(path), "no such file", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(what, str(path), f"cannot be read ({error})", "Give a readable UTF-8 YAML file") from None
    try:
        content = grammar.read_yaml(text)
    except UNREADABLE as error:
        where = " ".join(str(error).split())
        raise JobError(what, str(path), f"is not valid YAML: {where}", "Correct the line named above") from None
    if not isinstance(content, dict):
        raise JobError(what, str(path), "is not a mapping of keys", form)
    return content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` words into nested dictionaries; values follow the grammar of `trainer.config.values`."""
    for word in overrides:
        if "=" not in word or word.startswith(("=", "-")):
            remedy = "Write for example train.lr=0.1 (options such as --on go before or after, with two dashes)"
            raise JobError("argument", word, "is not key=value", remedy)
    merged = OmegaConf.create()
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = grammar.settle(grammar.parse_value(text), _is_text(key)) if text else ""
            OmegaConf.update(merged, key, value, force_add=True)
        except (*UNREADABLE, OmegaConfBaseException) as error:
            raise JobError(key, text, f"cannot be parsed ({_first_line(error)})", "Quote the value") from None
    result = OmegaConf.to_container(merged)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def _is_text(key: str) -> bool:
    declared = _find_field(key)
    return declared is not None and is_text_type(declared.type)


def _check_key(key: str, value: Any, source: str) -> None:
    if _find_field(key) is None:
        near = nearest_key(key)
        hint = f"Did you mean {near}?" if near else "See docs/configuration.md for every key"
        raise JobError(key, value, f"unknown key in {source}", hint)


def _check_kind(key: str, value: Any, source: str) -> None:
    """Refuse what OmegaConf has no word for: a list for a mapping, the reverse, and numbers that no machine holds."""
    found = _find_field(key)
    assert found is not None
    wanted = str(found.type).partition("[")[0]
    problem = None
    if wanted == "dict" and isinstance(value, list):
        problem = "is a list, not a mapping"
    elif wanted == "list" and isinstance(value, dict):
        problem = "is a mapping, not a list"
    elif wanted == "list" and isinstance(value, (str, int, float)) and "${" not in str(value):
        problem = "is not a list"
    elif wanted == "list" and isinstance(value, list) and any(isinstance(part, (list, dict)) for part in value):
        problem = "holds more than single values"
    elif isinstance(value, int) and value.bit_length() > 64:
        problem = "is too large a number"
    if problem:
        raise JobError(key, value, problem, f"It is set in {source}; {_expected(key)}")


def _check_limits(key: str, value: Any, limits: Any) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise wrong_choice(key, value, limits["choices"])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise JobError(key, value, "must be a finite number", f"It means: {limits['help']}")
    for name, (words, holds) in LIMITS.items():
        if name in limits and not holds(value, limits[name]):
            raise JobError(key, value, f"must be {words} {limits[name]}", f"It means: {limits['help']}")


def valid_keys(kind: type[Any] = Job, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every dotted key of the configuration with its field."""
    for item in dataclasses.fields(kind):
        inner: Any = item.default_factory
        if dataclasses.is_dataclass(inner):
            yield from valid_keys(cast(type[Any], inner), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def nearest_key(key: str) -> str | None:
    """The valid key that is spelt most like `key`, also when its section was left out or is wrong."""
    keys = [name for name, _ in valid_keys()]
    by_end = {name.rpartition(".")[2]: name for name in reversed(keys)}
    end = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, keys, 1, 0.75)
    if end in by_end or close:
        return by_end.get(end) or close[0]
    ends = difflib.get_close_matches(end, by_end, 1, 0.6)
    return by_end[ends[0]] if ends else None


def _find_field(key: str) -> dataclasses.Field[Any] | None:
    for name, item in valid_keys():
        if key == name or (key.startswith(name + ".") and name in ("task_args", "train.optimizer_args")):
            return item
    return None


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {name.partition(".")[0] for name, _ in valid_keys() if "." in name}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and full in sections:
            yield from _leaves(value, full + ".")
        elif full in sections:
            raise JobError(full, value, "is a section, not a value", f"Write its keys below it: {full}.<key>")
        elif isinstance(value, dict) and _find_field(full) is None:
            yield from _leaves(value, full + ".") if value else iter([(full, value)])
        else:
            yield full, value


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _expected(key: str) -> str:
    found = _find_field(key)
    return f"expected {found.type}: {found.metadata.get('help', '')}" if found else "see docs/configuration.md"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
