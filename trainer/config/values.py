"""One grammar for values: in job files, in site files and after `key=` on a command line.

Numbers, `true`, `false` and `null` are those of YAML 1.2. All else is text: `no`, `12:30:00`, `2024-01-01`, and `010`,
which may be an identifier. A key that is declared as text gets what was written: `1.10` stays `1.10`.
"""

import os
import re
from collections.abc import Container
from typing import Any

import yaml

from trainer.errors import JobError

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
NAMED: dict[str, Any] = {
    "": None, "~": None, "null": None, "true": True, "false": False,
    ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
FROM_ENVIRONMENT = re.compile(r"""\$\{\s*oc\.env\s*:\s*['"]?([^,}'"\s]+)""")
PATH_KEY = re.compile(r"^runs[:=].*$", re.MULTILINE)
"""A line of a job, or an override, whose value is a path of ours, which messages and remedies have to show."""
NAMES_A_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT", re.IGNORECASE)
NAMES_A_PLACE = re.compile(r"USER|LOGNAME|HOME|HOSTNAME|PWD|TMPDIR|SCRATCH|SLURM_(?!JWT).*")
"""Variables that say who and where we are: parts of most paths, and no secrets."""
SHORT = 8
"""Characters below which a text may be part of any message, such as `data` or `1024`."""
COLOUR = re.compile(r"[ \t]+(#(?:[0-9a-fA-F]{3}){1,2})[ \t]*$", re.MULTILINE)
ONE_OF_SEVERAL = re.compile(r"""(?:\[[^]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^,])+""")
VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What reading raises: ValueError for 5000 digits, TypeError for `<<: 1`, RecursionError for what holds itself."""


def read_yaml(text: str, texts: Container[str] = (), key: str = "") -> Any:
    """Read a document, the value of `key`; `texts`: dotted keys declared as text. Raises what `UNREADABLE` lists."""
    node = yaml.compose(text, Loader=yaml.BaseLoader)  # which leaves all scalars as they are
    return {} if node is None else _read(node, texts, key)


def parse_value(text: str, texts: Container[str] = (), key: str = "") -> Any:
    """As `read_yaml`, of what follows `key=`: a list, a mapping or quoted text, else one value as it stands."""
    return read_yaml(text, texts, key) if text[:1] in ("[", "{", "'", '"') else _read_plain(text, key in texts)


def _read(node: yaml.Node, texts: Container[str], key: str) -> Any:
    if isinstance(node, yaml.ScalarNode) and _is_text(node):
        return node.value if node.style else _read_plain(node.value, key in texts)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        for item in node.value:
            _refuse_colour(item, item.start_mark)
        # In a list of texts `null` and `~` are words too: a script gets its arguments as they are written.
        return [item.value if key in texts and _is_text(item) else _read(item, texts, key) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _read_mapping(node, texts, key)
    raise ValueError(f"the tag {node.tag} is not supported{node.start_mark}")


def _is_text(node: yaml.Node) -> bool:
    """Whether this is one value, which the loader leaves as text, without a tag of its own."""
    return bool(node.tag == "tag:yaml.org,2002:str")


def _refuse_colour(node: yaml.Node, mark: yaml.Mark, skip: int = 0) -> None:
    """Raise ValueError for a value that is nothing but a comment that looks like a colour."""
    colour = COLOUR.match(mark.buffer, mark.pointer + skip) if mark.buffer and node.value == "" else None
    if colour:
        raise ValueError(f"{colour[1]} is a comment to YAML: write '{colour[1]}', in quotes{mark}")


def _read_mapping(node: yaml.MappingNode, texts: Container[str], key: str) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for name_node, value_node in node.value:
        _refuse_colour(value_node, name_node.end_mark, 1)
        name: Any = str(name_node.value)
        if "." in key and key not in texts and not name_node.style:
            name = _read_plain(name, False)  # a key in a mapping of the user's may be a number
        if name in own:
            raise ValueError(f"{name!r} is given twice{name_node.start_mark}")
        if name != "<<":
            inner = key if key in texts else f"{key}.{name}" if key else name
            own[name] = _read(value_node, texts, inner)
            continue
        value = _read(value_node, texts, key)
        for part in value if isinstance(value, list) else [value]:
            merged = {**part, **merged}
    return {**merged, **own}


def _read_plain(text: str, as_text: bool) -> Any:
    name = text.lower() if text in (text.lower(), text.title(), text.upper()) else text  # nULL is text
    if name in NAMED and (NAMED[name] is None or not as_text):
        return NAMED[name]
    if as_text:
        return text
    if INTEGER.fullmatch(text):
        return int(text, 0)
    return float(text) if NUMBER.fullmatch(text) else text


def hidden_values(text: str) -> dict[str, str]:
    """What a job takes from variables, with the words that say so; `text`: the job as it is written.

    What a variable holds whose name says that it is a secret, however short; of the others no short texts, paths that
    exist or parts of the path of the runs: a message full of `${oc.env:USER}` names no folder and no command any more.
    """
    found: dict[str, str] = {}
    elsewhere = FROM_ENVIRONMENT.findall(PATH_KEY.sub("", text))
    for name in FROM_ENVIRONMENT.findall(text):
        value = os.environ.get(name, "")
        is_secret = NAMES_A_SECRET.search(name)
        is_plain = NAMES_A_PLACE.fullmatch(name) or name not in elsewhere or len(value) < SHORT
        if len(value) > 3 and (is_secret or not is_plain) and not os.path.exists(value):
            found |= dict.fromkeys((value, repr(value)[1:-1]), f"${{oc.env:{name}}}")
    return found


def is_text_type(declared: object) -> bool:
    """Whether a field's declared type, as written, is text, or a list or mapping of texts."""
    return declared is str or str(declared).replace(" | None", "") in ("str", "list[str]", "dict[str, str]")


def split_values(text: str) -> list[str]:
    """The values of `a,[1,2],'b,c'`: what is between the commas outside of brackets and quotes."""
    return ONE_OF_SEVERAL.findall(text)


def expand_path(key: str, path: str) -> str:
    """Replace a leading `~` and `$NAME` in a path, as a shell would. Raises JobError: no such user or variable."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        problem = "is not the home folder of any user"
        raise JobError(key, path, problem, "Write the whole path, or ./~ for a folder of that name")
    for name in VARIABLE.findall(expanded):
        if name not in os.environ:
            raise JobError(key, path, f"${name} is not set", "Set it, or write the whole path")
    return VARIABLE.sub(lambda match: os.environ[match[1]], expanded)
