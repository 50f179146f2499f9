"""Where a worker computes: the host's CPU, or one GPU with torch's own kernels. The one place that asks for CUDA.

A device is passed on explicitly, from a worker's birth to each tensor; there is no default one, and nothing goes
to the host in silence: torch refuses to mix tensors of two devices.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.errors import DeviceUnavailable

Kind = Literal["cpu", "cuda"]
HOST = torch.device("cpu")


def why_no_cuda() -> str:
    """Why there is no CUDA device for this process; empty: there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device or no driver for CUDA {torch.version.cuda}"
    return ""


def require(kind: Kind) -> None:
    """Raise DeviceUnavailable unless this process can compute there."""
    if kind == "cuda" and (why := why_no_cuda()):
        raise DeviceUnavailable(
            f"device (--device): 'cuda', but {why}; accepted: cpu, or a GPU and a torch built for it"
        )


def take(kind: Kind, share: float = 1.0) -> torch.device:
    """The device of this process from now on, told to round as IEEE 754 does. Raises DeviceUnavailable.

    Of several GPUs that it could see it takes the first; of that one's memory at most this share, in (0, 1].
    """
    require(kind)
    if kind == "cpu":
        return HOST
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(share, device)
    round_as_written()
    return device


def round_as_written() -> None:
    """No TF32, no sums of products in less than float32, and none split among blocks that add up in any order."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    torch.backends.cudnn.fp32_precision = "ieee"
    # (may be rounded on the way, may be split)
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = (False, False)


def name(kind: Kind) -> str:
    """As `status` shows it: cpu, or which GPU."""
    if kind == "cpu":
        return kind
    if why_no_cuda():
        return f"{kind} (none)"
    gpu = torch.cuda.get_device_properties(0)
    return f"{kind} {gpu.name} {str(gpu.uuid)[:8]}"


def free_cuda_bytes(device: torch.device) -> int:
    """What this process may still take of a GPU: what is free on it, within the process's share."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    unused = reserved - torch.cuda.memory_allocated(device)  # held by torch for what comes next
    return max(0, min(free, share - reserved)) + unused


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host for copies to and from a device, contents undefined; for a GPU pinned: read directly."""
    return torch.empty(shape, dtype=dtype, device=HOST, pin_memory=device.type == "cuda")
