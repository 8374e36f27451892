"""The Docker platform's site: `docker/site.yaml` as a dataclass, with the mistakes that the engine would not name."""

from dataclasses import dataclass, field
from pathlib import Path

from trainer.launch.site import check_rules


@dataclass
class DockerSite:
    """`docker/site.yaml`: see there for what each key means."""

    image: str = "muster"
    registry: str = ""
    mounts: list[str] = field(default_factory=list)
    shm: str = "auto"
    network: str = "auto"
    fabric: str = "none"
    env_file: str = ""
    extra_args: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        return f"{self.registry.rstrip('/')}/{self.image}" if self.registry else self.image

    def check(self) -> None:
        """Refuse mounts and files that are not on this machine. Raises JobError: there are some."""
        for mount in self.mounts:
            source, *rest = mount.split(":")
            well_formed = rest[:1] != [] and rest[0].startswith("/") and rest[1:] in ([], ["ro"])
            check_rules([
                (not well_formed, "mounts", mount, "is not source:target or source:target:ro",
                 "Both are absolute paths"),
                (not Path(source).exists(), "mounts", mount, f"{source} does not exist here",
                 "Make the folder first: the engine would create it as root"),
            ])  # fmt: skip
        missing = bool(self.env_file) and not Path(self.env_file).is_file()
        remedy = "Give the path of a file with NAME=value lines"
        check_rules([(missing, "env_file", self.env_file, "does not exist here", remedy)])
