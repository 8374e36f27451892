"""One grammar for values: in job files, in site files and after `key=` on a command line.

Numbers, `true`, `false` and `null` are those of YAML 1.2. All else is text: `no`, `12:30:00`, `2024-01-01`, and `010`,
which may be an identifier. A key that is declared as text gets what was written: `1.10` stays `1.10`.
"""

import os
import re
from collections.abc import Callable
from typing import Any

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
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What reading raises: ValueError for 5000 digits, TypeError for `<<: 1`, RecursionError for what holds itself."""


IsText = Callable[[str], bool]
"""Whether a dotted key is declared as text."""


def never_text(key: str) -> bool:
    """No key is declared as text."""
    return False


def read_yaml(text: str, is_text: IsText = never_text) -> Any:
    """Read a document. Raises what `UNREADABLE` lists: no YAML, a key twice, a tag, or what holds itself."""
    colour = COLOUR.search(text)
    if colour:
        raise ValueError(f"{colour[1]} is a comment to YAML: write '{colour[1]}', in quotes")
    node = yaml.compose(text, Loader=yaml.BaseLoader)  # which leaves all scalars as they are
    return {} if node is None else _read(node, "", is_text)


def parse_value(text: str, as_text: bool = False) -> Any:
    """Read what follows `key=`: a list, a mapping or quoted text as in YAML, else one value as it stands.

    Raises what `read_yaml` raises.
    """
    return read_yaml(text, lambda key: as_text) if text[:1] in ("[", "{", "'", '"') else _read_plain(text, as_text)


def _read(node: yaml.Node, key: str, is_text: IsText) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return node.value if node.style else _read_plain(node.value, is_text(key))
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_read(item, key, is_text) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _read_mapping(node, key, is_text)
    raise ValueError(f"the tag {node.tag} is not supported{node.start_mark}")


def _read_mapping(node: yaml.MappingNode, key: str, is_text: IsText) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = str(name_node.value)
        if name in own:
            raise ValueError(f"{name!r} is given twice{name_node.start_mark}")
        if name != "<<":
            inner = key if is_text(key) else f"{key}.{name}" if key else name
            own[name] = _read(value_node, inner, is_text)
            continue
        value = _read(value_node, key, is_text)
        for part in value if isinstance(value, list) else [value]:
            merged = {**part, **merged}
    return {**merged, **own}


def _read_plain(text: str, as_text: bool) -> Any:
    name = text.lower()
    if name in NAMED and (NAMED[name] is None or not as_text):
        return NAMED[name]
    if as_text:
        return text
    if INTEGER.fullmatch(text):
        return int(text, 0)
    return float(text) if NUMBER.fullmatch(text) else text


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
    """Replace a leading `~` and `$NAME` in a path, as a shell would. Raises JobError: no such user or variable."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        remedy = "Write the whole path, or ./~ for a folder of that name"
        raise JobError(key, path, "is not the home folder of any user", remedy)
    for name in VARIABLE.findall(expanded):
        if name not in os.environ:
            raise JobError(key, path, f"${name} is not set", "Set it, or write the whole path")
    return VARIABLE.sub(lambda match: os.environ[match[1]], expanded)
