"""Fixtures of the docker and kubernetes tiers: a real engine, a base image, the image from docker/Dockerfile.

Where no engine can run, every test that asks for one is skipped with the reason and the remedy.
"""

from collections.abc import Iterator
from pathlib import Path

import engine_base
import engine_image
import pytest
from engine import Engine, cache_folder, running_engine
from engine_image import Image
from engine_packages import Unavailable


@pytest.fixture(scope="session")
def engine_session() -> Iterator[Engine]:
    """The engine of this session, with the base image in it."""
    cache = cache_folder()
    try:
        with running_engine(cache) as engine:
            engine_base.ensure(engine, cache)
            yield engine
    except Unavailable as reason:
        pytest.skip(f"no container engine: {reason}")


@pytest.fixture(scope="session")
def wheels() -> Path:
    """Folder with the wheels that a build without a network installs from."""
    try:
        return engine_image.wheels(cache_folder())
    except Unavailable as reason:
        pytest.skip(f"no image: {reason}")


@pytest.fixture(scope="session")
def image(engine_session: Engine, wheels: Path) -> Image:
    """The project's image, built once per session; unchanged layers come from the cache."""
    return engine_image.build(engine_session, wheels)


@pytest.fixture
def engine(engine_session: Engine) -> Iterator[Engine]:
    """The engine for one test: its containers, networks and volumes are removed afterwards."""
    yield engine_session
    engine_session.remove_all()
