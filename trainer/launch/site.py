"""Site files: where the facts about a cluster or machine are. They are read and checked as strictly as job files."""

import re
from collections.abc import Iterable
from inspect import formatannotation
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import trainer
from trainer.config.load import read_sections
from trainer.config.values import expand_path, is_text_type
from trainer.errors import JobError, did_you_mean

Site = TypeVar("Site")
Rule = tuple[bool, str, object, str, str]
"""Whether something is wrong, and if so: key, value, problem, remedy."""


SSH_FOLDER = "~/.muster"
"""Where Muster puts what it needs on a machine that it is sent to."""
PATHS = ("runs", "setup", "env_file", "python", "image", "mounts")
"""Keys that hold paths, of the machine where jobs are submitted."""


def expand(key: str, value: Any) -> Any:
    """A path, or source:target, with `~` and `$NAME` replaced; what is no text stays for the check of types."""
    return expand_path(key, value) if isinstance(value, str) else value


def template(folder: str, name: str) -> Path:
    """A template: the working directory's, else ours: of the package, or beside it in a clone.

    Raises JobError: there is none.
    """
    for path in (Path.cwd() / folder / name, ours(f"{folder}/{name}")):
        if path.is_file():
            return path
    remedy = "Install muster-train again: its templates are missing"
    raise JobError(f"{folder}/{name}", str(Path.cwd()), "there is no such file", remedy)


def ours(name: str) -> Path:
    """A file or folder of Muster's: it lies beside the package in a clone, and inside of it in a wheel."""
    package = Path(trainer.__file__).resolve().parent
    places = package / "templates" / name, package / "templates/sources" / name, package.parent / name
    return next((path for path in places if path.exists()), places[-1])


def check_rules(rules: Iterable[Rule]) -> None:
    """Refuse what the first rule that applies says. Raises JobError: a rule applies."""
    for wrong, key, value, problem, remedy in rules:
        if wrong:
            raise JobError(key, value, problem, remedy)


def ssh_rules(site: Any) -> list[Rule]:
    """What is wrong with the keys that say how to reach another machine."""
    from trainer.launch.ssh.connection import ABSOLUTE, HOST

    paths = {key: getattr(site, key, None) or "~" for key in ("ssh_folder", "runs")} if site.ssh else {}
    relative = next((key for key, path in paths.items() if not re.fullmatch(ABSOLUTE, str(path))), "")
    remedy = "Write a host of ~/.ssh/config, or user@host; options belong in that file"
    return [
        (bool(site.ssh) and not re.fullmatch(HOST, str(site.ssh)), "ssh", site.ssh, "is not a host", remedy),
        (bool(relative), relative, paths.get(relative), "is not an absolute path",
         "Write one of the other machine; `~` and `$NAME` have their values from over there"),
        (bool(site.ssh_config) and not site.ssh, "ssh_config", site.ssh_config, "would be ignored without ssh",
         "Set ssh, or remove it"),
        (bool(site.ssh_config) and not Path(str(site.ssh_config)).is_file(), "ssh_config", site.ssh_config,
         "there is no such file", "Give the configuration file for ssh -F, or remove the key"),
    ]  # fmt: skip


def fabric_environment(name: str) -> dict[str, str]:
    """The variables that a network profile of `fabrics.yaml` sets; none for `none`. Raises JobError: there is none."""
    if name == "none":
        return {}
    profiles = read_sections(Path(__file__).with_name("fabrics.yaml"))
    if name not in profiles:
        raise JobError("fabric", name, "is not a network profile", "Choose one of none, " + ", ".join(profiles))
    return {variable: str(line["value"]) for variable, line in profiles[name].items()}


def read_site(path: Path | None, folder: str, kind: type[Site]) -> Site:
    """Read a site file, by default the platform's own. Raises JobError: a wrong key or value, or no such fabric."""
    path = path or template(folder, "site.yaml")
    types = {name: formatannotation(hint) for name, hint in get_type_hints(kind).items()}
    values = read_sections(path, [name for name, declared in types.items() if is_text_type(declared)])
    for key, value in values.items():
        if key not in types:
            remedy = did_you_mean(key, types, "Known keys: " + ", ".join(types))
            raise JobError(key, value, f"unknown key in {path}", remedy)
        if values.get("ssh") and key not in ("ssh", "ssh_config") and "${oc.env:" in str(value):
            remedy = "Set it over there, for example in ~/.profile. In paths, write $NAME: it is expanded over there"
            raise JobError(
                key, value, "would send a variable's value, which may be a secret, to the other machine", remedy
            )
        if key == "ssh_config" or (key in PATHS and not values.get("ssh")):  # others are of the machine that ssh names
            values[key] = [expand(key, each) for each in value] if isinstance(value, list) else expand(key, value)
    try:
        site: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "?")
        expected = types.get(key.partition(".")[0].partition("[")[0], "another type")
        text = str(error).strip().splitlines()[0]
        raise JobError(key, values.get(key), f"{text} in {path}", f"Expected {expected}") from None
    site.check()
    fabric_environment(site.fabric)
    assert isinstance(site, kind)
    return site
