"""An expert worker as a plain object: parcels in, rows out. Knows no requests, no Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Set

import torch
from torch import Tensor

from expert_workers.batcher import Batcher
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.staging import Staging
from expert_workers.tally import Tally
from model.experts import Expert, grouped
from router.config import RowsSent
from router.placement import EpochId, Member
from router.rows import sums, unpack
from router.transport.base import ExpertEnd, Parcel, RefusalReason, Spent


class ExpertWorker:
    def __init__(
        self, residency: Residency, end: ExpertEnd, config: ExpertConfig, rows_sent: RowsSent = "plain"
    ) -> None:
        """`rows_sent`: as the end's links carry them."""
        self._rows_sent = rows_sent
        self.residency = residency
        self.end = end
        num_layers = residency.checkpoint.config.num_layers
        self.batcher = Batcher(num_layers, config.batch_rows_max, config.batch_parcels_max, config.join_wait_s)
        self.tally = Tally(num_layers, residency.checkpoint.config.num_experts)
        self._staging = Staging(residency.device, end.device)
        self._taken_ns: dict[int, int] = {}  # when each parcel in hand, by its id(), was taken in
        self.rows = 0
        self.batches = 0
        self.parcels = 0  # answered; divided by `batches`: how many are joined
        self.held_s = 0.0  # waited, with parcels in hand, for others to join them
        self.refused = 0
        self.products = 0  # computed, two for each expert of a batch

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
            self._taken_ns[id(parcel)] = time.perf_counter_ns()
            self.batcher.add(parcel, time.monotonic())
            parcel = None if self.batcher.is_full else self.end.receive(0.0)

    @torch.inference_mode()
    def _answer(self, batch: list[Parcel]) -> None:
        layer, began_ns = batch[0].layer, time.perf_counter_ns()
        queued_ns = {id(parcel): began_ns - self._taken_ns.pop(id(parcel)) for parcel in batch}
        held = self.residency.layer(layer)  # read once: a retirement replaces the table, it does not change it
        batch = [parcel for parcel in batch if self._may_answer(parcel, held)]
        if not batch:
            return
        rows, route_rows = _joined([self._rows_of(parcel) for parcel in batch], [p.route_rows for p in batch])
        experts = torch.cat([p.route_experts for p in batch])
        out = grouped(held, self._staging.to_device(rows), route_rows, experts, self._between)  # [r, H]
        out = self._staging.to_host(out)
        self.rows += len(out)
        self.batches += 1
        self.tally.add(layer, experts)
        computed_ns = time.perf_counter_ns() - began_ns
        self.parcels += len(batch)
        for parcel, part in zip(batch, out.split([len(p.route_rows) for p in batch]), strict=True):
            self.end.reply(parcel, _answer(parcel, part), Spent(queued_ns[id(parcel)], computed_ns))

    def _rows_of(self, parcel: Parcel) -> Tensor:
        """[n, H]."""
        return (
            parcel.rows
            if self._rows_sent == "plain"
            else unpack(parcel.rows, self.residency.checkpoint.config.hidden_size)
        )

    def _between(self) -> None:
        """After each product: a long batch is no silence."""
        self.products += 1
        self.end.pulse()

    def _may_answer(self, parcel: Parcel, held: dict[int, Expert]) -> bool:
        why = why_refused(parcel, self.residency.member, self.residency.oldest_epoch, held.keys())
        if why is not None:
            self._refuse(parcel, *why)
        return why is None

    def _refuse(self, parcel: Parcel, reason: RefusalReason, detail: str) -> None:
        self.refused += 1
        self.end.refuse(parcel, reason, detail)


def why_refused(
    parcel: Parcel, member: Member, oldest: EpochId, held: Set[int]
) -> tuple[RefusalReason, str] | None:
    """Why a parcel gets no rows here: it is not for this life, this epoch or the experts held of its layer."""
    missing = sorted(set(parcel.route_experts.tolist()) - held)
    if parcel.to != member:
        return RefusalReason.WRONG_INCARNATION, f"this is {member}"
    if parcel.epoch < oldest:
        return RefusalReason.STALE_EPOCH, f"oldest is {oldest}"
    if missing:
        return RefusalReason.NOT_RESIDENT, f"layer {parcel.layer}, experts {missing[:8]}"
    return None


def _answer(parcel: Parcel, rows: Tensor) -> Tensor:
    """rows [r, H], of its routes -> what its sender asked for."""
    if parcel.route_weights is None:
        return rows
    return sums(rows, parcel.route_weights, parcel.route_rows, len(parcel.rows))


def _joined(rows: list[Tensor], route_rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of several parcels: all rows [n, H], those of one alone in place, and which of them each route takes [r]."""
    if len(rows) == 1:
        return rows[0], route_rows[0]
    ends = itertools.accumulate(map(len, rows))
    moved = [own + (end - len(part)) for own, end, part in zip(route_rows, ends, rows, strict=True)]
    return torch.cat(rows), torch.cat(moved)
