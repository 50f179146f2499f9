"""Every test here needs a GPU, and says why it found none."""

import pytest

from model import device


@pytest.fixture(scope="session")
def cuda():
    if why := device.why_no_cuda():
        pytest.skip(f"no CUDA device: {why}")
    return device.take("cuda")
