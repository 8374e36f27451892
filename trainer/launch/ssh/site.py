"""What a site file says of another machine: where things are there, and what of the file goes there."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.launch.ssh.packages import requirements

OF_HERE = ("ssh", "ssh_config", "ssh_folder", "runs")
"""Keys of a site that the other machine does not need: how to get there, and what is decided here."""


def is_given(site: Any) -> bool:
    """Whether the site names the Python that submits there; that of a container is another one."""
    return site.python is not None and getattr(site, "runtime", "none") == "none"


def runs_of(site: Any) -> str:
    """Where run folders are over there."""
    return getattr(site, "runs", None) or f"{site.ssh_folder}/runs"


def where(site: Any) -> dict[str, Any]:
    """What the handle keeps of the site, because it decides which machine and folder that is."""
    return {
        "ssh": site.ssh, "ssh_config": site.ssh_config and os.path.abspath(site.ssh_config),
        "ssh_folder": site.ssh_folder, "python": site.python if is_given(site) else None, "runs": runs_of(site),
    }  # fmt: skip


def wanted(site: Any, code: Path) -> dict[str, str]:
    """What the environment over there is made from; nothing where the site names one."""
    return {} if is_given(site) else requirements(code, getattr(site, "runtime", "docker") != "none")


def site_text(site: Any) -> str:
    """The site file for over there. The Python that runs Muster there is that of the agents."""
    left_out = (*OF_HERE, "python") if getattr(site, "runtime", "none") == "none" else OF_HERE
    return json.dumps({key: value for key, value in asdict(site).items() if key not in left_out}, indent=1) + "\n"
