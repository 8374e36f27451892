"""Fixtures of the docker tier; the engine and the image come from engine_fixtures.py."""

from pathlib import Path

import pytest
from docker_runs import Runs
from engine import Engine
from engine_image import Image


@pytest.fixture
def runs(engine: Engine, image: Image, tmp_path: Path) -> Runs:
    """Runs in the project's image."""
    return Runs(engine, image, tmp_path)
