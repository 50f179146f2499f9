"""An expert worker as a process runs it: one thread that answers parcels, one that loads weights. No Ray.

Loading never holds up answering: new experts become resident one by one beside those in use. Freed slots are
freed between turns, by the thread that reads them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from expert_workers.config import ExpertConfig
from expert_workers.pace import Pace
from expert_workers.residency import Residency
from expert_workers.worker import ExpertWorker
from model.checkpoint import Checkpoint
from model.device import HOST, Kind, take
from model.errors import ModelError, NotEnoughMemory
from model.exact import NumericsError
from model.memory import available_bytes, choose, require
from router.config import RouterConfig
from router.errors import RouterError
from router.membership import Failed, Health, HealthState, MemberEvent, Prepared, Unprepared
from router.placement import EpochId, Member, Placement
from router.transport.base import ExpertEnd, LinkIdentity
from router.transport.cuda import gpu_for
from router.transport.select import expert_end

log = logging.getLogger(__name__)

_ORDERS_MAX = 64
_TURN_WAIT_S = 0.5
_BEHIND = 5  # niceness of the thread that loads: who serves goes before it, here and beside
PERMANENT = (ModelError, NumericsError, RouterError)


class ExpertService:
    def __init__(
        self,
        model_path: Path,
        member: Member,
        token: str,
        config: ExpertConfig,
        router: RouterConfig,
        transport: str,
        host: str,
        device: Kind,
        device_share: float,
        on_event: Callable[[MemberEvent], None],
    ) -> None:
        """`host`: this machine's address where attention workers on others reach it. `device_share`: how much of a
        GPU's memory it may take, in (0, 1]."""
        self.member = member
        self._model_path, self._token, self._config, self._router = model_path, token, config, router
        self._transport, self._host = transport, host
        self._kind, self._device_share, self._device = device, device_share, HOST
        self._on_event = on_event
        self._orders: queue.Queue[tuple[Placement, bool] | None] = queue.Queue(_ORDERS_MAX)
        self._retired: queue.Queue[EpochId] = queue.Queue(_ORDERS_MAX)
        self._stopping = threading.Event()
        self._turns = 0
        self._state, self._detail = HealthState.STARTING, ""
        self._residency: Residency | None = None
        self._worker: ExpertWorker | None = None
        self._end: ExpertEnd | None = None
        self._loader = threading.Thread(target=self._load, name="expert-loader", daemon=True)
        self._answerer = threading.Thread(target=self._answer, name="expert-compute", daemon=True)

    # --- from outside ------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where attention workers reach it; empty before `start`, or when that failed."""
        return self._end.address if self._end is not None else ""

    def start(self) -> None:
        """Check the checkpoint and listen. Emits Failed when either cannot be."""
        try:
            self._listen()
        except PERMANENT as error:
            self._fail(str(error))
            return
        self._loader.start()
        self._answerer.start()

    def prepare(self, placement: Placement, unhurried: bool = False) -> None:
        """Load in the background what the placement gives this worker. Emits Prepared; or Unprepared where it has
        no room for it but serves another, which goes on; or Failed. `unhurried`: at `load_bytes_per_s`, for the
        sake of what is being answered."""
        self._orders.put_nowait((placement, unhurried))

    def retire(self, epoch: EpochId) -> None:
        """Free, between two turns, what only this epoch and older ones held."""
        self._retired.put_nowait(epoch)
        if self._end is not None:
            self._end.wake()

    def health(self) -> Health:
        residency, worker = self._residency, self._worker
        if residency is None or worker is None:
            return Health(self._state, detail=self._detail)
        gauges = {
            "slots_used": float(residency.num_slots_used),
            "rows_total": float(worker.rows),
            "batches_total": float(worker.batches),
            "parcels_total": float(worker.parcels),
            "join_wait_seconds_total": worker.held_s,
            "parcels_refused_total": float(worker.refused),
            "memory_available_bytes": float(available_bytes(self._device)),
        }
        return Health(
            self._state, residency.bytes_loaded, residency.bytes_total, self._detail, gauges,
            residency.bytes_kept, residency.kept_as, load=worker.tally.total(),
        )  # fmt: skip

    def turns(self) -> dict[str, int]:
        """What grows while the thread that answers turns."""
        return {"compute": self._turns + (self._worker.products if self._worker is not None else 0)}

    def stop(self, grace_s: float) -> None:
        """End after the batch in hand. Threads and descriptors are gone when this returns."""
        self._stopping.set()
        self._orders.put(None, timeout=grace_s)  # wakes an idle loader
        if self._end is not None:
            self._end.wake()
        for thread in (self._loader, self._answerer):
            if thread.is_alive():
                thread.join(grace_s)
        if self._end is not None:
            self._end.close()

    def _listen(self) -> None:
        self._device = take(self._kind, self._device_share)
        checkpoint = Checkpoint.open(self._model_path)
        model = checkpoint.config
        dtype = getattr(torch, model.dtype if self._config.dtype == "auto" else self._config.dtype)
        self._residency = Residency(checkpoint, self.member, dtype, self._config.numerics, self._device)
        numerics = self._config.numerics
        rows, replies = self._router.rows_sent(numerics), self._router.answers(numerics)
        identity = LinkIdentity(
            self.member, checkpoint.fingerprint, self._token, model.hidden_size, dtype, rows, replies
        )
        router = self._router.fitted(model.experts_per_token, model.hidden_size, dtype.itemsize)
        gpu = gpu_for(self._transport, self._device)
        self._end = expert_end(self._transport, identity, router, host=self._host, gpu=gpu)
        self._worker = ExpertWorker(self._residency, self._end, self._config, rows)
        self._state, self._detail = HealthState.LOADING, "waiting for a placement"

    # --- loader thread -----------------------------------------------------------------------

    def _load(self) -> None:
        os.nice(_BEHIND)
        torch.set_num_threads(self._config.threads)
        try:
            while (order := self._orders.get()) is not None and not self._stopping.is_set():
                self._prepare(*order)
        except PERMANENT as error:
            self._fail(str(error))
        except Exception as error:
            # The thread's one net: a worker that has lost its loader must be seen as failed and replaced.
            log.exception("expert worker %s", self.member)
            self._fail(f"{type(error).__name__}: {error}")

    def _prepare(self, placement: Placement, unhurried: bool) -> None:
        residency = self._residency
        assert residency is not None
        self._detail = f"loading experts of epoch {placement.epoch.term}.{placement.epoch.number}"
        keep = choose(self._config.weights, residency.bytes_needed(placement, "dequantised"), self._device)
        needed = residency.bytes_needed(placement, keep)
        remedy = "accepted: more expert workers, fewer replicas, or more memory"
        try:
            require(needed, "expert weights", remedy, self._device)
        except NotEnoughMemory as error:
            if self._state is not HealthState.READY:
                raise
            self._detail = ""
            self._on_event(Unprepared(placement.epoch, str(error)))
            return
        beside_work = unhurried and self._state is HealthState.READY
        pace = Pace(self._config.load_bytes_per_s if beside_work else 0, time.monotonic())

        def rest(nbytes: int) -> None:
            if self._orders.empty():  # else something else waits
                self._stopping.wait(pace.wait_s(nbytes, time.monotonic()))

        residency.prepare(placement, self._stopping.is_set, keep, rest)
        if not self._stopping.is_set():
            self._state, self._detail = HealthState.READY, ""
            self._on_event(Prepared(placement.epoch))

    def _fail(self, why: str) -> None:
        self._state, self._detail = HealthState.FAILED, why
        self._on_event(Failed(why))

    # --- compute thread ----------------------------------------------------------------------

    def _answer(self) -> None:
        assert self._worker is not None
        assert self._residency is not None
        torch.set_num_threads(self._config.threads)
        try:
            while not self._stopping.is_set():
                self._turns += 1
                self._worker.turn(_TURN_WAIT_S)
                while not self._retired.empty():
                    self._residency.retire(self._retired.get_nowait())
        except Exception as error:
            # The thread's one net, as above.
            log.exception("expert worker %s", self.member)
            self._fail(f"{type(error).__name__}: {error}")
