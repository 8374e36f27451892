"""The GPU tier: everything here needs an NVIDIA GPU, and says so when there is none."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU: run `make test-gpu` on a machine that has one")
