"""A device that is not the host, for machines that have none: its kernels are the CPU's, its tensors are not.

As on a GPU an operation that mixes the two is an error, and so is reading a tensor's memory from the host: only
copies cross. So whatever of a step is made on the wrong device is found. It is stricter than a GPU, which takes
indices of the host, and waits for them. Once registered it stays: use a process of its own.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "board"
HOST = torch.device("cpu")

to_host: list[torch.Size] = []
"""Shapes of what has been copied to the host."""


class OnBoard(torch.Tensor):
    @staticmethod
    def __new__(cls, hidden):
        with torch.inference_mode(False):
            own = torch.Tensor._make_wrapper_subclass(
                cls, hidden.shape, strides=hidden.stride(), storage_offset=hidden.storage_offset(),
                dtype=hidden.dtype, device=torch.device(NAME, 0),
            )  # fmt: skip
        own.hidden = hidden
        return own

    def data_ptr(self):
        """An address says how well a tensor is aligned; nothing may read there."""
        return self.hidden.data_ptr()

    def __repr__(self, **_):
        return f"OnBoard({self.hidden})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    given = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    asked = kwargs.get("device")
    strangers = [x for x in given if not isinstance(x, OnBoard) and x.dim()]
    if strangers and len(strangers) < len(given):
        if func._schema.name != "aten::copy_":
            raise RuntimeError(f"{func} mixes tensors of {NAME} and of the host")
        if not isinstance(args[0], OnBoard):
            to_host.append(args[0].shape)
    args, kwargs = tree.tree_map_only(OnBoard, lambda x: x.hidden, (args, kwargs))
    if asked is not None:
        kwargs["device"] = HOST
    out = func(*args, **kwargs)
    if asked is not None and torch.device(asked).type == "cpu":
        to_host.append(out.shape)
        return out
    return tree.tree_map_only(torch.Tensor, OnBoard, out)


def register() -> torch.device:
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
    register.library = library  # it lasts as long as this
    return torch.device(NAME, 0)
