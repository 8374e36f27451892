"""What the test cluster needs of the operating system: rights, programs, and the packages with them."""

import os
import shutil
import subprocess

# Program -> Debian package that brings it. Slurm and its database come from the distribution: what is tested
# is the Slurm that a user has.
PACKAGE_OF = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
}
# Daemons live here, and an ordinary user's PATH leaves it out.
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


class Unavailable(Exception):
    """This machine cannot run a cluster. The message names the reason and the remedy."""


def missing_packages() -> list[str]:
    """Names the Debian packages whose program is not installed, sorted."""
    programs = (name for name in PACKAGE_OF if not shutil.which(name, path=SYSTEM_PATH))
    return sorted({PACKAGE_OF[name] for name in programs})


def ensure(install: bool) -> None:
    """Returns when a cluster can run here; `install` lets it install what is missing. Else Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("Slurm's daemons and their networks need root: run `sudo make test-slurm`")
    missing = missing_packages()
    if missing and not shutil.which("apt-get", path=SYSTEM_PATH):
        raise Unavailable(f"missing programs: run this tier on Debian or Ubuntu, which have {' '.join(missing)}")
    if missing and install:
        _install(missing)
        missing = missing_packages()
    if missing:
        raise Unavailable(
            "missing packages: run `make test-slurm`, which installs them, or "
            f"`apt-get install --no-install-recommends {' '.join(missing)}`"
        )
    # Costs a millisecond, and says at once what a container without the right would say later and worse.
    probe = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    if probe.returncode:
        raise Unavailable(
            f"no private namespaces ({probe.stderr.strip()}): run as root on a machine, or in a container "
            "with --privileged"
        )


def _install(packages: list[str]) -> None:
    # Recommended packages would start a mail server and a database; the time-out waits for another apt.
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]
    for command in ([*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Unavailable(f"`{' '.join(command)}` failed; is the package mirror reachable?\n{done.stderr.strip()}")
