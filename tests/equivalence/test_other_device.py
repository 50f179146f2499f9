"""Everything of a step is made on the model's device, shown on one that is not the host (`other_device.py`)."""

import os
import subprocess
import sys
from pathlib import Path

PROMISES = Path(__file__).with_name("other_device_promises.py")


def test_a_worker_computes_on_its_device():
    """In a process of its own: a device, once registered, stays."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PROMISES)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=PROMISES.parents[2], env=dict(os.environ))
    assert ran.returncode == 0, ran.stdout + ran.stderr
