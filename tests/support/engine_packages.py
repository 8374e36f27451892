"""The programs of the test engine: Debian packages unpacked into a folder of our own, never installed.

Nothing on the machine changes: no service starts, no package is added, and deleting the folder undoes it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

# trixie's engine has buildx, BuildKit's --build-context and compose v2, and needs libc 2.34 only.
ENGINE_SUITE = "trixie"
ENGINE_PACKAGES = ("docker.io", "docker-cli", "containerd", "docker-buildx", "docker-compose")
# These are linked against their own release's libc, so they come from the release that runs here.
HOST_PACKAGES = (
    "runc",
    "libseccomp2",
    "iptables",
    "libip4tc2",
    "libip6tc2",
    "libxtables12",
    "libnftnl11",
    "libmnl0",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "docker-registry",
    "mmdebstrap",
    "tini",
)
HOST_SUITES = ("bookworm", "trixie")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Unavailable(Exception):
    """This machine cannot run the engine. The message names the reason and the remedy."""


def host_suite() -> str:
    """The Debian release that runs here, such as bookworm. Raises Unavailable elsewhere."""
    release = platform.freedesktop_os_release() if os.path.exists("/etc/os-release") else {}
    suite = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or suite not in HOST_SUITES:
        name = release.get("PRETTY_NAME", platform.system())
        raise Unavailable(f"{name} has no tested engine packages: run this tier on Debian {' or '.join(HOST_SUITES)}")
    return suite


def mirror() -> str:
    """The package mirror that this machine already uses. Raises Unavailable when there is none."""
    suite = host_suite()
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Release: {suite}"],
        capture_output=True,
        text=True,
    )
    if not targets.stdout:
        raise Unavailable(f"apt knows no mirror of {suite}: add one to /etc/apt/sources.list")
    return targets.stdout.split()[0]


def preconditions() -> None:
    """Raises Unavailable, with the remedy, when this machine can never start the engine."""
    if os.geteuid() != 0:
        raise Unavailable("a container engine needs root: run `sudo make test-docker`")
    host_suite()
    for program, package in {
        "apt-get": "apt",
        "unshare": "util-linux",
        "ip": "iproute2",
        "perl": "perl",
    }.items():
        if not shutil.which(program):
            raise Unavailable(f"{program} is missing: apt-get install {package}")
    # The namespaces need the same right as the engine itself, and say so in a millisecond.
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        raise Unavailable(
            f"no private namespaces ({probe.stderr.strip()}): run as root on a machine, not in a container"
        )


def unpack(cache: Path) -> Path:
    """Downloads and unpacks the packages once, and returns the root of the unpacked tree.

    Raises Unavailable when the mirror does not answer.
    """
    suite = host_suite()
    digest = hashlib.sha256(" ".join((*ENGINE_PACKAGES, *HOST_PACKAGES)).encode()).hexdigest()[:8]
    root = cache / f"packages-{suite}-{ENGINE_SUITE}-{platform.machine()}-{digest}"
    if root.exists():
        return root
    work = cache / f"{root.name}.part"  # renamed when complete, so that an interrupted download is never used
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("apt/lists/partial", "apt/cache/archives/partial", "root"):
        (work / folder).mkdir(parents=True)
    apt = _private_apt(work / "apt", suite)
    _run(["apt-get", "-qq", "update"], work, apt)
    packages = [f"{name}/{ENGINE_SUITE}" for name in ENGINE_PACKAGES] + [f"{name}/{suite}" for name in HOST_PACKAGES]
    _run(["apt-get", "-qq", "download", *packages], work, apt)
    for package in work.glob("*.deb"):
        _run(["dpkg-deb", "--extract", package.name, "root"], work, apt)
    for name in ("iptables", "ip6tables"):  # an installed package would have update-alternatives make these
        (work / "root/usr/sbin" / name).symlink_to("xtables-nft-multi")
    (work / "root").rename(root)
    shutil.rmtree(work)
    return root


def environment(root: Path) -> dict[str, str]:
    """Variables that make the unpacked programs find each other and their libraries."""
    library = next(root.glob("usr/lib/*-linux-gnu"))
    return {
        "PATH": f"{root}/usr/sbin:{root}/usr/bin:{SYSTEM_PATH}",
        "LD_LIBRARY_PATH": str(library),
        "XTABLES_LIBDIR": str(library / "xtables"),
    }


def _private_apt(folder: Path, suite: str) -> dict[str, str]:
    """An apt that shares the machine's mirror and keys and nothing else."""
    sources = {ENGINE_SUITE, suite}
    uri = mirror()
    (folder / "sources.list").write_text("".join(f"deb [signed-by={KEYRING}] {uri} {name} main\n" for name in sources))
    (folder / "status").touch()
    (folder / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{folder}/sources.list"; Dir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::Lists "{folder}/lists"; Dir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache";\n'
        'Acquire::Languages "none"; Acquire::Retries "3";\n'
        'APT::Sandbox::User "root";\n'  # the usual _apt user cannot write here
    )
    return {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}


def _run(command: list[str], cwd: Path, env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command[:3])}` failed; is the package mirror reachable?\n{done.stderr.strip()}")
