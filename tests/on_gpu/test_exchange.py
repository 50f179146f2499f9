"""The conformance suite of the exchange with rows on a GPU: real CUDA and NCCL, no Ray, one GPU is enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "EXPERTMESH_TEST_DEVICE": "cuda",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # NCCL 2.30 and later: two ranks on one GPU
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
}


@pytest.mark.parametrize("kind", ["cuda_ipc", "nccl"])
def test_the_exchange_contract_holds(cuda, kind):
    """In one process, between processes, and through `kill -9`."""
    pytest.importorskip("cupy", reason="the extra `gpu` is not installed: pip install cupy-cuda12x")
    tests = ROOT / "tests/contracts"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kind, "--timeout", "120",
        *(str(tests / f"test_exchange_{name}.py") for name in (kind, "processes", "encodings")),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
