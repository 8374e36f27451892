"""A real registry of images, where the engine is."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from engine import Engine

REGISTRY = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "{address}"}}
{more}
"""


@contextlib.contextmanager
def serving(engine: Engine, address: str, *command: object) -> Iterator[None]:
    """Let a server run in the engine's network, and wait until it listens."""
    with subprocess.Popen(engine.inside(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            host, _, port = address.partition(":")
            probe = f"import socket; socket.create_connection(({host!r}, {port})).close()"
            end = time.monotonic() + 30
            while subprocess.run(engine.inside(sys.executable, "-c", probe), stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None and time.monotonic() < end, command
                time.sleep(0.05)
            yield
        finally:
            server.kill()


@contextlib.contextmanager
def registry(engine: Engine, folder: Path, address: str, more: str = "") -> Iterator[None]:
    """A registry of Debian's; `more`: of its configuration."""
    folder.mkdir()
    (folder / "registry.yaml").write_text(REGISTRY.format(folder=folder / "images", address=address, more=more))
    with serving(engine, address, engine.root / "usr/bin/docker-registry", "serve", folder / "registry.yaml"):
        yield
