"""Network profiles by name: variables that a site's fabric needs, read from `fabrics.yaml` beside this file."""

from pathlib import Path

from trainer.config.load import read_sections
from trainer.errors import JobError


def fabric_environment(name: str) -> dict[str, str]:
    """The variables of a profile; none for `none`. Raises JobError: there is no such profile."""
    if name == "none":
        return {}
    profiles = read_sections(Path(__file__).with_name("fabrics.yaml"))
    if name not in profiles:
        raise JobError("fabric", name, "is not a network profile", "Choose one of none, " + ", ".join(profiles))
    return {variable: str(line["value"]) for variable, line in profiles[name].items()}
