"""One grammar for values: in job files, in site files and after `key=` on a command line.

Numbers, `true`, `false` and `null` are those of YAML 1.2. All else is text: `no`, `12:30:00`, `2024-01-01`, and `010`,
which may be an identifier. A key that is declared as text gets what was written: `1.10` stays `1.10`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from trainer.errors import JobError

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
NAMED: dict[str, Any] = {
    "": None, "~": None, "null": None, "true": True, "false": False,
    ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
COLOUR = re.compile(r":[ \t]+(#(?:[0-9a-fA-F]{3}){1,2})[ \t]*$", re.MULTILINE)
VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What reading raises: ValueError for 5000 digits, RecursionError for a list that holds itself."""


class Written(NamedTuple):
    """A number or a truth value, with the text that it was read from."""

    value: Any
    text: str


def read_yaml(text: str) -> Any:
    """Read a document; each number and truth value is a `Written`.

    Raises:
        ValueError, yaml.YAMLError, RecursionError: it is not YAML, gives a key twice, has a tag, or means itself.
    """
    colour = COLOUR.search(text)
    if colour:
        raise ValueError(f"{colour[1]} is a comment to YAML: write '{colour[1]}', in quotes")
    node = yaml.compose(text, Loader=yaml.BaseLoader)  # which leaves all scalars as they are
    return {} if node is None else _read(node)


def parse_value(text: str) -> Any:
    """Read what follows `key=`: a list, a mapping or quoted text as in YAML, else one value as it stands.

    Raises:
        as `read_yaml`.
    """
    return read_yaml(text) if text[:1] in ("[", "{", "'", '"') else _read_plain(text)


def _read(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return node.value if node.style else _read_plain(node.value)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_read(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _read_mapping(node)
    raise ValueError(f"the tag {node.tag} is not supported{node.start_mark}")


def _read_mapping(node: yaml.MappingNode) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in own:
            raise ValueError(f"{key!r} is given twice{key_node.start_mark}")
        value = _read(value_node)
        if key != "<<":
            own[key] = value
            continue
        for part in value if isinstance(value, list) else [value]:
            merged = {**part, **merged}
    return {**merged, **own}


def _read_plain(text: str) -> Any:
    name = text if text in NAMED else text.lower()
    if name in NAMED:
        value = NAMED[name]
        return None if value is None else Written(value, text)
    if INTEGER.fullmatch(text):
        return Written(int(text, 0), text)
    if NUMBER.fullmatch(text):
        return Written(float(text), text)
    return text


def settle(value: Any, is_text: bool) -> Any:
    """The value without `Written`: the text where text is wanted, else the number or truth value."""
    if isinstance(value, Written):
        return value.text if is_text else value.value
    if isinstance(value, dict):
        return {key: settle(part, is_text) for key, part in value.items()}
    if isinstance(value, list):
        return [settle(part, is_text) for part in value]
    return value


def settle_keys(values: dict[str, Any], is_text: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """The values of a job or site file without `Written`; `is_text` says of a dotted key whether it is text."""
    settled = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not is_text(name):
            settled[key] = settle_keys(value, is_text, f"{name}.")
        else:
            settled[key] = settle(value, is_text(name))
    return settled


def is_text_type(declared: object) -> bool:
    """Whether a field's declared type, as written, is text, or a list or mapping of texts."""
    return str(declared).replace(" | None", "") in ("str", "list[str]", "dict[str, str]")


def split_values(text: str) -> list[str]:
    """Split `a,b,c` at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def expand_path(key: str, path: str) -> str:
    """Replace a leading `~` and `$NAME` in a path, as a shell would.

    Raises:
        JobError: such a variable is not set, or there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise JobError(
            key, path, "is not the home folder of any user", "Write the whole path, or ./~ for a folder of that name"
        )
    for name in VARIABLE.findall(expanded):
        if name not in os.environ:
            raise JobError(key, path, f"${name} is not set", "Set it, or write the whole path")
    return VARIABLE.sub(lambda match: os.environ[match[1]], expanded)
