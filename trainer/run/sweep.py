"""The folder of a sweep: its runs, which lie beside it, and the value of each. Who submits them is in `launch`."""

from dataclasses import dataclass
from pathlib import Path

from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, each with its value of the key."""

    folder: RunFolder
    key: str
    values: list[str]
    runs: list[RunFolder]

    def write(self) -> None:
        runs = [str(run) for run in self.runs]
        text = f"{self.key}={','.join(self.values)}"
        write_json(self.folder.sweep, {"sweep": text, "key": self.key, "values": self.values, "runs": runs})

    @property
    def lines(self) -> list[str]:
        """Each run's folder and value."""
        return [f"{run}  {self.key}={value}" for run, value in zip(self.runs, self.values, strict=True)]


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep of a folder; None: it is none. Its runs are beside it, also where all of them were moved to."""
    run = RunFolder(folder.resolve())
    found = read_json(run.sweep)
    if found is None:
        return None
    key, _, text = str(found["sweep"]).partition("=")
    runs = [near if (near := run.path.parent / Path(path).name).is_dir() else Path(path) for path in found["runs"]]
    values = found.get("values") or text.split(",")  # older versions kept the text alone
    values = values if len(values) == len(runs) else ["?"] * len(runs)
    return Sweep(run, key, values, [RunFolder(path) for path in runs])
