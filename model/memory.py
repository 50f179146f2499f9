"""How much memory weights will take and this process may still take, and a clear refusal before it takes more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import psutil
import torch

from model.checkpoint import ROUTER_SUFFIXES, SCALE_SUFFIX, Checkpoint
from model.device import free_cuda_bytes
from model.errors import NotEnoughMemory
from model.exact import bytes_kept
from model.linear import Keep

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available_bytes(device: torch.device) -> int:
    """What may be taken there. Of the host: free on the machine, or what the container's limit leaves if less."""
    if device.type == "cuda":
        return free_cuda_bytes(device)
    free = int(psutil.virtual_memory().available)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(_CGROUP_USED.read_text()))
    except FileNotFoundError:
        return free  # no container limit
    return max(free, 0)


def bytes_in_memory(
    checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype, keep: Keep, device: torch.device
) -> int:
    """Bytes on the device of these tensors, as stored, once a worker that serves in `dtype` has loaded them.

    All become `dtype`; but the router is float32, and FP8 may be kept: else its scales are let go.
    """
    total = 0
    for name in names:
        entry = checkpoint.entry(name)
        stored, elements = entry.end - entry.begin, math.prod(entry.shape)
        if entry.dtype == "F8_E4M3" or name.endswith(SCALE_SUFFIX):
            is_let_go = name.endswith(SCALE_SUFFIX)
            total += stored if keep == "fp8" else 0 if is_let_go else bytes_kept(elements, dtype, device)
        else:
            total += bytes_kept(elements, torch.float32 if name.endswith(ROUTER_SUFFIXES) else dtype, device)
    return total


def choose(setting: Keep | Literal["auto"], dequantised_bytes: int, device: torch.device) -> Keep:
    """How to hold FP8 weights that take so much dequantised: the faster way if memory allows it, unless told."""
    if setting == "auto":
        return "dequantised" if dequantised_bytes <= available_bytes(device) else "fp8"
    return setting


def require(needed: int, what: str, remedy: str, device: torch.device) -> None:
    """Raise NotEnoughMemory unless `needed` bytes can be taken."""
    free = available_bytes(device)
    if needed > free:
        where = "" if device.type == "cpu" else f" on {device}"
        raise NotEnoughMemory(
            f"{what} need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are available{where}; {remedy}"
        )
