"""The Slurm platform's site: `slurm/site.yaml` as a dataclass, with the mistakes that Slurm would not name."""

from dataclasses import dataclass, field

from trainer.launch.site import check_rules


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

    def check(self) -> None:
        """Refuse keys that contradict each other. Raises JobError: they do."""
        plain, runtimes = self.runtime == "none", ("none", "pyxis", "apptainer")
        check_rules([
            (self.runtime not in runtimes, "runtime", self.runtime, "must be one of " + ", ".join(runtimes),
             "Choose one of them"),
            (self.gpus not in ("auto", "none") and "{n}" not in self.gpus, "gpus", self.gpus,
             "must be auto, none or an option with {n}", "For example --gres=gpu:a100:{n}"),
            (not plain and not self.image, "image", self.image, f"runtime={self.runtime} needs an image", "Set image"),
            (plain and bool(self.image or self.mounts), "image", self.image,
             "would be ignored, because runtime is none", "Set runtime, or remove image and mounts"),
        ])  # fmt: skip
