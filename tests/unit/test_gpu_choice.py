"""Whether rows go from GPU to GPU: what is missing is named, and nothing is loaded before it is needed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from router.errors import GpuUnavailable
from router.transport.cuda import GPU_KINDS, gpu_for

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")


def test_on_the_host_rows_need_no_gpu() -> None:
    for kind in ("auto", "shm", "grpc"):
        assert gpu_for(kind, HOST) is None
    for kind in ("shm", "grpc"):
        assert gpu_for(kind, CUDA) is None


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_a_gpu_transport_without_a_gpu_says_what_is_accepted(kind: str) -> None:
    with pytest.raises(GpuUnavailable, match=f"'{kind}', but the device is cpu; accepted"):
        gpu_for(kind, HOST)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is installed")
def test_without_cupy_the_package_is_named_and_auto_goes_through_the_host(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for kind in GPU_KINDS:
        with pytest.raises(GpuUnavailable, match=r"pip install 'expertmesh\[gpu\]' \(package cupy-cuda12x\)"):
            gpu_for(kind, CUDA)
    assert gpu_for("auto", CUDA) is None
    assert "cupy is not installed" in caplog.text
