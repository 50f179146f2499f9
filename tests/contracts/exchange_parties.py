"""Two parties for exchange tests: identities, parcels, and an expert worker in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from router.config import RouterConfig
from router.errors import EndClosed
from router.placement import EpochId, Member
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Peer
from router.transport.cuda import GPU_KINDS, Gpu, gpu_for
from tests.contracts.stand_in_gpu import StandInGpu

HIDDEN = 6
DEVICE = torch.device(os.environ.get("EXPERTMESH_TEST_DEVICE", "cpu"))  # where rows lie in tests of GPU links
CONFIG = RouterConfig(connect_timeout_s=5.0, link_bytes_max=1 << 16, rows_max=64, experts_per_row_max=4)
PATIENCE_S = 20.0  # far beyond what anything here takes; a wait this long is a failure


def identity(
    name: str = "attention-0",
    incarnation: int = 1,
    fingerprint: str = "0123456789abcdef",
    token: str = "swordfish",
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
) -> LinkIdentity:
    return LinkIdentity(Member(name, incarnation), fingerprint, token, hidden, dtype)


def gpu_of(kind: str) -> Gpu | None:
    """What an end of this kind is given: a GPU, or what stands in for one."""
    if DEVICE.type == "cuda":
        return gpu_for(kind, DEVICE)
    return StandInGpu() if kind in GPU_KINDS else None


def parcel(
    sender: LinkIdentity,
    to: Member,
    ticket: int = 1,
    rows: Tensor | int = 2,
    route_rows: Sequence[int] | None = None,
    layer: int = 3,
) -> Parcel:
    """`rows`: the rows themselves or how many; by default each goes to one expert."""
    if isinstance(rows, int):
        rows = torch.arange(rows * sender.hidden, dtype=sender.dtype).view(rows, sender.hidden)
    chosen = torch.tensor(range(len(rows)) if route_rows is None else route_rows, dtype=torch.int32)
    experts = torch.arange(len(chosen), dtype=torch.int32) % 5
    return Parcel(sender.member, to, EpochId(7, 2), ticket, layer, rows.to(DEVICE), chosen, experts)


def connect(end: AttentionEnd, peers: Sequence[Peer], timeout_s: float = PATIENCE_S) -> dict[Member, str]:
    """Prepare and adopt in one go: who could not be linked, and why."""
    return end.adopt(end.prepare(peers, timeout_s))


def computed(parcel: Parcel) -> Tensor:
    """What the experts of these tests make of a parcel: a function of row, expert and layer."""
    factors = (parcel.route_experts + 2).to(parcel.rows.dtype).unsqueeze(1)
    return parcel.rows[parcel.route_rows] * factors.to(parcel.rows.device) + parcel.layer


def answer(end: ExpertEnd, parcel: Parcel) -> None:
    end.reply(parcel, computed(parcel))


class ExpertThread:
    """An expert worker: hands each parcel to `behave` in a thread of its own, until left."""

    def __init__(self, end: ExpertEnd, who: LinkIdentity, behave: Callable[[ExpertEnd, Parcel], None]) -> None:
        self.end = end
        self.member = who.member
        self.peer = Peer(who.member, end.address)
        self._behave = behave
        self._leaving = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"expert {who.member.id}")

    def __enter__(self) -> ExpertThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Die: to its peers as if killed. Raises what went wrong in the thread."""
        self._leaving.set()
        self.end.wake()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the expert thread hangs"
        self.end.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                received = self.end.receive(PATIENCE_S)
                if received is not None:
                    self._behave(self.end, received)
        except EndClosed:
            return  # `behave` closed it
        except BaseException as failure:
            self._failure = failure
