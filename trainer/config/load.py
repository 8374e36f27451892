"""Loading a job: defaults < job file < `key=value`. Each mistake is a JobError, before anything is started."""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from trainer.config.job import Job
from trainer.config.rules import check_job
from trainer.config.user_code import add_import_paths
from trainer.config.values import UNREADABLE, expand_path, hidden_values, is_text_type, parse_value, read_yaml
from trainer.errors import HIDDEN, JobError, did_you_mean, hide, wrong_choice


def valid_keys(kind: type[Any] = Job, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every dotted key of the configuration with its field."""
    for item in dataclasses.fields(kind):
        inner: Any = item.default_factory
        if dataclasses.is_dataclass(inner):
            yield from valid_keys(cast(type[Any], inner), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


KEYS = dict(valid_keys())
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
TEXTS = {key for key, item in KEYS.items() if is_text_type(item.type)}
PATHS = {key for key, item in KEYS.items() if item.metadata.get("path")}
FREE = re.compile(r"^(task_args|train\.optimizer_args)\..*")  # keys below those that take any
NOT_SET = re.compile(r"Environment variable '([^']*)' not found")
LIMITS = {
    "minimum": ("at least", operator.ge), "maximum": ("at most", operator.le),
    "above": ("more than", operator.gt), "below": ("less than", operator.lt),
}  # fmt: skip


def merge_job(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge defaults, job file and overrides, unresolved. Raises JobError: unreadable file, unknown key, wrong type."""
    path = Path(path)
    written = read_sections(path, TEXTS, "JOB")
    given = parse_overrides(overrides)
    if given.get("parallel") == "single" and "devices" not in given:
        for key in {"nodes", "devices_per_node", "devices"} - given.keys():
            written.pop(key, None)  # one device is what single means: the file's counts step back
    config = merge_sources({str(path): written, "the command line": given})
    if not (given.get("name") or written.get("name")):
        config.name = name_of(path.resolve().parent.name if path.name == "job.yaml" else path.stem)
    with contextlib.suppress(OmegaConfBaseException):  # an interpolation that `to_job` refuses
        if not config.script:  # a script's own folder comes first, and only where it runs
            add_import_paths(path / "job.yaml" if path.is_dir() else path, config.python_path)
    return config


def merge_sources(sources: Mapping[str, dict[str, Any]], base: Job | type[Job] = Job) -> DictConfig:
    """Merge values over `base`, the later over the earlier; by what an error calls their source.

    Raises JobError: unknown key, wrong type.
    """
    config = OmegaConf.structured(base)
    for source, values in sources.items():
        leaves = dict(_leaves(values))
        for key, value in leaves.items():
            _check_value(key, value, source)
        try:
            config = OmegaConf.merge(config, values)
        except OmegaConfBaseException as error:
            key = str(error.full_key or "?")
            remedy = f"It is set in {source}; {_expected(key)}"
            raise JobError(key, leaves.get(key), _first_line(error), remedy) from None
        for key in PATHS & leaves.keys():
            if leaves[key] is not None:
                several = isinstance(leaves[key], list)
                expanded = [expand_path(key, each) for each in (leaves[key] if several else [leaves[key]])]
                OmegaConf.update(config, key, expanded if several else expanded[0])
    assert isinstance(config, DictConfig)
    return config


def name_of(file: str) -> str:
    """A name for a job that has none: that of its file, with '-' for what a name cannot hold."""
    plain = unicodedata.normalize("NFKD", file).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", plain)[:63].strip("-._") or "job"


def to_job(config: DictConfig, code_is_here: bool = True) -> Job:
    """Resolve and check a merged configuration. Raises JobError: wrong range, or settings that contradict.

    `code_is_here`: whether the user's modules must be on this machine.
    """
    hide_values_of(to_text(config))
    try:
        job = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "?")
        if missing := NOT_SET.search(str(error)):
            remedy = f"Set {missing[1]} where the job runs: its value is kept nowhere, so each start needs it again"
            raise JobError(key, f"${{oc.env:{missing[1]}}}", f"the variable {missing[1]} is not set", remedy) from None
        remedy = "Write ${section.key} for another key, ${oc.env:NAME} for a variable, and \\${ for the text itself"
        if isinstance(error, MissingMandatoryValue):
            raise JobError(key, "???", "stands for a value that is missing", "Write the value") from None
        raise JobError(key, "${...}", _first_line(error), remedy) from None
    assert isinstance(job, Job)
    for name, item in KEYS.items():
        value = operator.attrgetter(name)(job)
        if value is not None:
            _check_limits(name, value, item.metadata)
    check_job(job, code_is_here)
    return job


def hide_values_of(text: str) -> None:
    """Let no error of this process show what a job takes from variables; `text`: the job as it is written."""
    HIDDEN.clear()
    HIDDEN.update(hidden_values(text))


def to_text(config: DictConfig) -> str:
    """The merged job as YAML. Interpolations stay as written, so a secret from the environment is never stored."""
    return OmegaConf.to_yaml(config, resolve=False)


def read_sections(path: Path, texts: Container[str] = (), what: str = "file") -> dict[str, Any]:
    """Read a YAML file into plain dictionaries. Raises JobError for `what`: not there, or not a mapping in YAML."""
    if path.is_dir():
        path = path / "job.yaml"
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), texts)
    except FileNotFoundError:
        others = map(str, sorted(path.parent.glob("*.yaml")))
        remedy = did_you_mean(path, others, f"Working directory: {os.getcwd()}", 0.3)
        raise JobError(what, str(path), "no such file", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(what, str(path), f"cannot be read ({error})", "Give a readable UTF-8 YAML file") from None
    except UNREADABLE as error:
        where = " ".join(str(error).split())
        raise JobError(what, str(path), f"is not valid YAML: {where}", "Correct the line named above") from None
    if not isinstance(content, dict):
        raise JobError(what, str(path), "is not a mapping of keys", "Write one `key: value` a line")
    return content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` words into nested dictionaries; values follow the grammar of `trainer.config.values`."""
    merged = OmegaConf.create()
    for word in overrides:
        if "=" not in word or word.startswith(("=", "-")):
            remedy = "Write for example train.lr=0.1 (options such as --on go before or after, with two dashes)"
            raise JobError("argument", word, "is not key=value", remedy)
        key, _, text = word.partition("=")
        try:
            OmegaConf.update(merged, key, parse_value(text, TEXTS, key) if text else "", force_add=True)
        except (*UNREADABLE, OmegaConfBaseException) as error:
            raise JobError(key, text, f"cannot be parsed ({_first_line(error)})", "Quote the value") from None
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def _find_field(key: str) -> dataclasses.Field[Any] | None:
    return KEYS.get(FREE.sub(r"\1", key))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key with its value; of an unknown section, those below it."""
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in SECTIONS and not isinstance(value, dict):
            raise JobError(full, value, "is a section, not a value", f"Write its keys below it: {full}.<key>")
        if full in SECTIONS or (isinstance(value, dict) and value and _find_field(full) is None):
            yield from _leaves(value, f"{full}.")
        else:
            yield full, value


def _check_value(key: str, value: Any, source: str) -> None:
    """Refuse unknown keys, and what OmegaConf has no word for: the wrong container, numbers that no machine holds."""
    found = _find_field(key)
    if found is None:
        raise JobError(key, value, f"unknown key in {source}", _nearest_key(key))
    to_list, is_list = str(found.type).startswith("list"), isinstance(value, list)
    problems = {
        "is a list, not a mapping": str(found.type).startswith("dict") and is_list,
        "is a mapping, not a list": to_list and isinstance(value, dict),
        "is not a list": to_list and isinstance(value, (str, int, float)) and "${" not in str(value),
        "holds more than single values": to_list and is_list and any(isinstance(part, (list, dict)) for part in value),
        "is too large a number": isinstance(value, int) and value.bit_length() > 64,
    }
    problem = next((problem for problem, broken in problems.items() if broken), None)
    if problem:
        raise JobError(key, value, problem, f"It is set in {source}; {_expected(key)}")


def _nearest_key(key: str) -> str:
    """A remedy that names the valid key that is spelt most like `key`, also when its section is missing or wrong."""
    by_end = {name.rpartition(".")[2]: name for name in reversed(KEYS)}
    end = key.rpartition(".")[2]
    near = [by_end[end]] if end in by_end else difflib.get_close_matches(key, KEYS, 1, 0.75)
    near = near or [by_end[each] for each in difflib.get_close_matches(end, by_end, 1)]
    return f"Did you mean {near[0]}?" if near else "See docs/configuration.md for every key"


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


def _expected(key: str) -> str:
    found = _find_field(key)
    return f"expected {found.type}: {found.metadata.get('help', '')}" if found else "see docs/configuration.md"


def _first_line(error: BaseException) -> str:
    return (hide(str(error)).strip().splitlines() or [type(error).__name__])[0]
