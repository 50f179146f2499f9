"""Transports are for any process: bench, simulator and tests use them where there is no Ray, and no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib, pathlib, sys
sys.modules["ray"] = sys.modules["cupy"] = None  # whoever imports them gets ImportError
for file in sorted(pathlib.Path("router").rglob("*.py")):
    if file.name == "cupy_gpu.py":
        continue  # the one file that needs cupy, which few have
    importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
assert not [name for name in sys.modules if name.split(".")[0] in ("cluster", "gateway", "attention_workers")]

import torch
from router.config import RouterConfig
from router.placement import Member
from router.transport.base import LinkIdentity, Peer
from router.transport.select import attention_end, expert_end
for kind in ("shm", "grpc", "auto", "faulty:shm"):
    me, peer = (LinkIdentity(Member(name, 1), "0123456789abcdef", "", 4, torch.float32) for name in "ae")
    expert, attention = expert_end(kind, peer, RouterConfig()), attention_end(kind, me, RouterConfig())
    attention.close()
    expert.close()
print("linked without Ray")
"""


def test_every_file_of_the_router_imports_and_every_transport_stands_without_ray() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'proto']\n{SCRIPT}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "linked without Ray" in ended.stdout
