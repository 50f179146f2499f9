"""An expert worker as a plain object: parcels in, rows out. Knows no requests, no Ray."""

from __future__ import annotations

import time

import torch

from expert_workers.batcher import Batcher
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.staging import Staging
from model.experts import Expert, grouped
from router.transport.base import ExpertEnd, Parcel, RefusalReason


class ExpertWorker:
    def __init__(self, residency: Residency, end: ExpertEnd, config: ExpertConfig) -> None:
        self.residency = residency
        self.end = end
        num_layers = residency.checkpoint.config.num_layers
        self.batcher = Batcher(num_layers, config.batch_rows_max, config.batch_parcels_max, config.join_wait_s)
        self._staging = Staging(residency.device)
        self.rows = 0
        self.batches = 0
        self.parcels = 0  # answered; divided by `batches`: how many are joined
        self.held_s = 0.0  # waited, with parcels in hand, for others to join them
        self.refused = 0
        self.experts = 0  # computed, each with its rows of one batch

    def turn(self, timeout_s: float) -> bool:
        """Take in what waits and answer one batch. False when none was answered: nothing came within `timeout_s`,
        or what came is held for others to join, for as long as the next turn's wait."""
        self._take_in(timeout_s)
        batch = self.batcher.next_batch(time.monotonic())
        if batch:
            self._answer(batch)
        return bool(batch)

    def _take_in(self, timeout_s: float) -> None:
        """What more there is than `batch_parcels_max` waits in its sender's link."""
        if self.batcher.is_full:
            return
        now_s = time.monotonic()
        held_s = self.batcher.wait_s(now_s)
        parcel = self.end.receive(timeout_s if held_s is None else min(timeout_s, held_s))
        if held_s:
            self.held_s += time.monotonic() - now_s
        while parcel is not None:
            self.batcher.add(parcel, time.monotonic())
            parcel = None if self.batcher.is_full else self.end.receive(0.0)

    @torch.inference_mode()
    def _answer(self, batch: list[Parcel]) -> None:
        layer = batch[0].layer
        held = self.residency.layer(layer)  # read once: a retirement replaces the table, it does not change it
        batch = [parcel for parcel in batch if self._may_answer(parcel, held)]
        if not batch:
            return
        rows = torch.cat([p.rows[p.route_rows.long()] for p in batch])  # [r, H]
        experts = torch.cat([p.route_experts for p in batch])
        out = self._staging.to_host(grouped(held, self._staging.to_device(rows), experts, self._between))
        self.rows += len(rows)
        self.batches += 1
        self.parcels += len(batch)
        for parcel, part in zip(batch, out.split([len(p.route_rows) for p in batch]), strict=True):
            self.end.reply(parcel, part)

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
