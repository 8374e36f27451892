"""Site files: where the facts about a cluster or machine are. They are read and checked as strictly as job files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import trainer
from trainer.config.load import read_sections
from trainer.config.values import is_text_type
from trainer.errors import JobError

Site = TypeVar("Site")
Rule = tuple[bool, str, object, str, str]
"""Whether something is wrong, and if so: key, value, problem, remedy."""


def template(folder: str, name: str) -> Path:
    """A template file: that of the working directory, else the one that came with this package.

    Raises:
        JobError: neither exists.
    """
    for root in (Path.cwd(), Path(trainer.__file__).resolve().parent.parent):
        path = root / folder / name
        if path.is_file():
            return path
    remedy = f"Copy the folder {folder}/ of a clone of Muster to here"
    raise JobError(f"{folder}/{name}", str(Path.cwd()), "there is no such file", remedy)


def check_rules(rules: Iterable[Rule]) -> None:
    """Refuse what the first rule that applies says.

    Raises:
        JobError: a rule applies.
    """
    for wrong, key, value, problem, remedy in rules:
        if wrong:
            raise JobError(key, value, problem, remedy)


def read_site(path: Path | None, folder: str, kind: type[Site]) -> Site:
    """Read a site file into its dataclass; without a path the platform's `site.yaml`.

    Raises:
        JobError: unknown key or wrong type, naming the nearest key.
    """
    path = path or template(folder, "site.yaml")
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = read_sections(path, {name for name, item in known.items() if is_text_type(item.type)})
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            remedy = f"Did you mean {near[0]}?" if near else "Known keys: " + ", ".join(known)
            raise JobError(key, value, f"unknown key in {path}", remedy)
    try:
        merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "?")
        expected = known[key.partition(".")[0].partition("[")[0]].type if key != "?" else "another type"
        text = str(error).strip().splitlines()[0]
        raise JobError(key, values.get(key), f"{text} in {path}", f"Expected {expected}") from None
    assert isinstance(merged, kind)
    return merged
