"""The Slurm platform's site: `slurm/site.yaml` as a dataclass, with the mistakes that Slurm would not name."""

from dataclasses import dataclass, field
from pathlib import Path

from trainer.launch.fabric import fabric_environment
from trainer.launch.site import check_rules, read_site


@dataclass
class SlurmSite:
    """`slurm/site.yaml`: see there for what each key means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time_limit_min: int | None = None
    memory_gb: int | None = None
    cpus_per_device: int | None = None
    gpus: str = "auto"
    runs: str | None = None
    python: str | None = None
    setup: str | None = None
    fabric: str = "none"
    sbatch_args: list[str] = field(default_factory=list)
    srun_args: list[str] = field(default_factory=list)
    runtime: str = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)


def load_slurm_site(path: Path | None) -> SlurmSite:
    """Read and check a site file. Raises JobError: unknown key, wrong type, or keys that contradict each other."""
    site = read_site(path, "slurm", SlurmSite)
    plain, runtimes = site.runtime == "none", ("none", "pyxis", "apptainer")
    check_rules([
        (site.runtime not in runtimes, "runtime", site.runtime, "must be one of " + ", ".join(runtimes),
         "Choose one of them"),
        (site.gpus not in ("auto", "none") and "{n}" not in site.gpus, "gpus", site.gpus,
         "must be auto, none or an option with {n}", "For example --gres=gpu:a100:{n}"),
        (not plain and not site.image, "image", site.image, f"runtime={site.runtime} needs an image", "Set image"),
        (plain and bool(site.image or site.mounts), "image", site.image, "would be ignored, because runtime is none",
         "Set runtime, or remove image and mounts"),
    ])  # fmt: skip
    fabric_environment(site.fabric)
    return site
