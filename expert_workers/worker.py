"""An expert worker as a plain object: parcels in, rows out. Knows no requests, no Ray."""

from __future__ import annotations

import time

import torch

from expert_workers.batcher import Batcher
from expert_workers.residency import Residency
from expert_workers.staging import Staging
from model.experts import Expert, grouped
from router.transport.base import ExpertEnd, Parcel, RefusalReason, Spent

_JOIN_MAX = 64  # parcels taken in before computing; what more there is waits in its sender's ring


class ExpertWorker:
    def __init__(self, residency: Residency, end: ExpertEnd, rows_max: int) -> None:
        self.residency = residency
        self.end = end
        self.batcher = Batcher(rows_max)
        self._staging = Staging(residency.device, end.device)
        self._taken_ns: dict[int, int] = {}  # when each parcel in hand, by its id(), was taken in
        self.rows = 0
        self.batches = 0
        self.refused = 0
        self.experts = 0  # computed, each with its rows of one batch

    def turn(self, timeout_s: float) -> bool:
        """Take in what waits and answer one batch. False when nothing came within `timeout_s`."""
        wait_s = timeout_s if not len(self.batcher) else 0.0
        while len(self.batcher) < _JOIN_MAX and (parcel := self.end.receive(wait_s)) is not None:
            self._taken_ns[id(parcel)] = time.perf_counter_ns()
            self.batcher.add(parcel)
            wait_s = 0.0
        if not len(self.batcher):
            return False
        self._answer(self.batcher.next_batch())
        return True

    @torch.inference_mode()
    def _answer(self, batch: list[Parcel]) -> None:
        layer, began_ns = batch[0].layer, time.perf_counter_ns()
        queued_ns = {id(parcel): began_ns - self._taken_ns.pop(id(parcel)) for parcel in batch}
        held = self.residency.layer(layer)  # read once: a retirement replaces the table, it does not change it
        batch = [parcel for parcel in batch if self._may_answer(parcel, held)]
        if not batch:
            return
        rows = torch.cat([p.rows[p.route_rows.long().to(p.rows.device)] for p in batch])  # [r, H]
        experts = torch.cat([p.route_experts for p in batch])
        out = self._staging.to_host(grouped(held, self._staging.to_device(rows), experts, self._between))
        self.rows += len(rows)
        self.batches += 1
        computed_ns = time.perf_counter_ns() - began_ns
        for parcel, part in zip(batch, out.split([len(p.route_rows) for p in batch]), strict=True):
            self.end.reply(parcel, part, Spent(queued_ns[id(parcel)], computed_ns))

    def _between(self) -> None:
        """After each expert: a long batch is no silence."""
        self.experts += 1
        self.end.pulse()

    def _may_answer(self, parcel: Parcel, held: dict[int, Expert]) -> bool:
        """Refuse a parcel that is not for this life, this epoch or these experts."""
        missing = sorted(set(parcel.route_experts.tolist()) - held.keys())
        if parcel.to != self.residency.member:
            self._refuse(parcel, RefusalReason.WRONG_INCARNATION, f"this is {self.residency.member}")
        elif parcel.epoch < self.residency.oldest_epoch:
            self._refuse(parcel, RefusalReason.STALE_EPOCH, f"oldest is {self.residency.oldest_epoch}")
        elif missing:
            self._refuse(parcel, RefusalReason.NOT_RESIDENT, f"layer {parcel.layer}, experts {missing[:8]}")
        else:
            return True
        return False

    def _refuse(self, parcel: Parcel, reason: RefusalReason, detail: str) -> None:
        self.refused += 1
        self.end.refuse(parcel, reason, detail)
