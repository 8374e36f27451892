"""Base image of the tests: a stand-in for the slim Python image, made from Debian packages.

It promises what docker/Dockerfile asks of any base: `python3` with pip, and a shell.
"""

import os
import subprocess
from pathlib import Path

import engine_packages
from engine import Engine

# The release whose python3 is the version that the project's pinned dependencies are tested with.
SUITE = "bookworm"
PYTHON = "3.11"
TAG = f"muster-test-base:{SUITE}"
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")


def ensure(engine: Engine, cache: Path) -> str:
    """Makes the base image where the engine lacks it, and returns its tag."""
    if engine.docker("image", "inspect", TAG, check=False).returncode:
        path = f"PATH={engine_packages.SYSTEM_PATH}"
        changes = [f"--change=ENV {setting}" for setting in (path, "LANG=C.UTF-8")]
        engine.docker("import", *changes, '--change=CMD ["python3"]', _archive(engine, cache), TAG)
    return TAG


def _archive(engine: Engine, cache: Path) -> Path:
    archive = cache / f"base-{SUITE}.tar"
    if archive.exists():
        return archive
    part = archive.with_suffix(".part.tar")
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=apt",
        "--include=python3,python3-pip,ca-certificates",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",  # no fsync per file: a half-made archive is never used anyway
        '--aptopt=Apt::Install-Recommends "false"',
        '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
        '--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"',  # the engine writes its own
        SUITE,
        str(part),
        f"deb [signed-by={engine_packages.KEYRING}] {engine_packages.mirror()} {SUITE} main",
    ]
    programs = engine_packages.environment(engine.root) | {"DEBIAN_FRONTEND": "noninteractive"}
    del programs["LD_LIBRARY_PATH"]  # it would follow into the new system's own programs
    done = subprocess.run(
        command, env={**os.environ, **programs}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise engine_packages.Unavailable(f"the base image could not be made:\n{done.stderr[-2000:]}")
    part.rename(archive)
    return archive
