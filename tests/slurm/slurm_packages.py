"""What the test cluster needs from the operating system: the programs, and the Debian packages with them."""

import os
import shutil
import subprocess

# Program -> Debian package that brings it. All of Slurm and its database come from the distribution:
# what is tested is the Slurm that a user has.
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


def missing_packages() -> list[str]:
    """Names the Debian packages whose program is not installed, sorted."""
    return sorted({package for program, package in PACKAGE_OF.items() if not shutil.which(program, path=SYSTEM_PATH)})


def install_command(packages: list[str]) -> str:
    return f"apt-get install --yes --no-install-recommends {' '.join(packages)}"


def install(packages: list[str]) -> None:
    """Installs packages with apt-get, as root. Raises RuntimeError with apt's own words when it cannot."""
    # Recommended packages would start mail servers and a system database; the lock timeout waits for another apt.
    lock = ["-o", "DPkg::Lock::Timeout=600"]
    for command in (["apt-get", *lock, "-qq", "update"], install_command(packages).split() + lock + ["-qq"]):
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")


def why_not(install_missing: bool) -> str | None:
    """Says why no cluster can run here and what would change that, or None when one can.

    With install_missing, root gets the missing packages installed first.
    """
    if os.geteuid() != 0:
        return "needs root, to make network namespaces and start Slurm's daemons: run `sudo make test-slurm`"
    missing = missing_packages()
    if missing and not shutil.which("apt-get"):
        return f"needs Debian or Ubuntu, or programs that provide: {' '.join(missing)}"
    if missing and install_missing:
        install(missing)
        missing = missing_packages()
    if missing:
        return f"missing packages: run `make test-slurm` as root, or `{install_command(missing)}`"
    if not os.path.exists("/proc/self/ns/pid") or not os.access("/proc/self/ns/net", os.R_OK):
        return "this kernel or container has no namespaces"
    return None
