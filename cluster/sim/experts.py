"""A simulated expert worker: the real batcher and refusals, around slots that fill with time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from cluster.events import Exit, OrderBody, Prepare, Register, Retire, Role
from cluster.sim.arithmetic import SHAPE, expert
from cluster.sim.exchange import Answer, Carried, Pulse, carry
from cluster.sim.member_link import MemberLink
from cluster.sim.network import EXCHANGE, End, Network
from cluster.sim.process import Bell, Process, Work
from cluster.sim.settings import EXPERT, EXPERTS_ROW_S, EXPERTS_S, LOAD_SLOT_S
from expert_workers.batcher import Batcher
from expert_workers.tally import Tally
from expert_workers.worker import why_refused
from router.config import RouterConfig
from router.membership import Health, HealthState, Prepared
from router.placement import EpochId, Placement
from router.rows import sums
from router.transport.base import Parcel, Refusal, Reply
from router.transport.patience import PULSES

Slot = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class Received(Parcel):
    link: End = field(repr=False)
    place: int = field(default=0, kw_only=True)  # in its ticket


class ExpertShell:
    def __init__(self, process: Process, network: Network, config: RouterConfig) -> None:
        self.process = process
        self.address = f"{EXCHANGE}{process}"
        self.epoch: EpochId | None = None  # last prepared
        self.slots: set[Slot] = set()
        self.has_changed = False  # slots or epochs, since they were last checked
        self.oldest = EpochId(0, 0)  # epochs below it are retired
        self.batcher = Batcher(
            SHAPE.num_layers, EXPERT.batch_rows_max, EXPERT.batch_parcels_max, EXPERT.join_wait_s
        )
        self._tally = Tally(SHAPE.num_layers, SHAPE.num_experts)
        self._pulse_s = config.combine_timeout_s / PULSES
        self._wanted: dict[EpochId, frozenset[Slot]] = {}
        self._orders: deque[Placement] = deque()
        self._retired: deque[EpochId] = deque()
        self._has_orders, self._has_parcels = Bell(), Bell()
        self._links: list[End] = []
        self.member_link = MemberLink(process, network, self._register, self._health, self._obey)
        network.listen(self.address, process, self._accept)
        self.member_link.start()
        process.spawn(self._load())
        process.spawn(self._answer())

    def _register(self) -> Register:
        return Register(Role.EXPERT, self.process.pid, self.process.node, "cpu", self.address, self.epoch)

    def _health(self) -> Health:
        state = HealthState.LOADING if self.epoch is None else HealthState.READY
        return Health(state, bytes_loaded=len(self.slots), load=self._tally.total())

    def _obey(self, order: OrderBody) -> None:
        match order:
            case Prepare(placement):
                self._orders.append(placement)
                self._has_orders.ring()
            case Retire(epoch):
                self._retired.append(epoch)
                self._has_parcels.ring()
            case Exit(reason):
                self.process.after(0.05, lambda: self.process.end(f"told to exit: {reason}"))

    def _load(self) -> Work:
        """New experts become resident one by one beside those in use."""
        while True:
            if not self._orders:
                yield self._has_orders, 60.0
                continue
            placement = self._orders.popleft()
            wanted = frozenset(s for w in placement.workers if w.member == self.process.member for s in w.experts)
            self._wanted[placement.epoch] = wanted  # first, so that no retirement frees what is being loaded
            for slot in sorted(wanted - self.slots):
                yield None, LOAD_SLOT_S * self.process.slow
                self.slots.add(slot)
            self.epoch, self.has_changed = placement.epoch, True
            self.member_link.report(Prepared(placement.epoch))

    def _retire(self, epoch: EpochId) -> None:
        self.has_changed = True
        self.oldest = max(self.oldest, EpochId(epoch.term, epoch.number + 1))
        self._wanted = {e: slots for e, slots in self._wanted.items() if e >= self.oldest}
        self.slots &= frozenset[Slot]().union(*self._wanted.values())

    # Parcels.

    def _accept(self, end: End) -> None:
        end.on_message = lambda carried: self._receive(end, carried)
        end.on_end = lambda _why: self._links.remove(end)
        self._links.append(end)
        end.send(Pulse())

    def _receive(self, end: End, carried: Carried) -> None:
        p = carried.parcel
        received = Received(
            p.sender, p.to, p.epoch, p.ticket, p.layer, p.rows, p.route_rows, p.route_experts, end,
            place=carried.place, route_weights=p.route_weights,
        )  # fmt: skip
        self.batcher.add(received, self.process.now_s())
        self._has_parcels.ring()

    def _answer(self) -> Work:
        while True:
            wait_s = self.batcher.wait_s(self.process.now_s())
            if wait_s is None or wait_s > 0:
                yield self._has_parcels, 0.5 if wait_s is None else wait_s
            batch = self.batcher.next_batch(self.process.now_s())
            if batch:
                yield from self._compute([parcel for parcel in batch if isinstance(parcel, Received)])
            while self._retired:
                self._retire(self._retired.popleft())

    def _compute(self, batch: list[Received]) -> Work:
        layer = batch[0].layer
        held = {e for at, e in self.slots if at == layer}  # read once
        taken = [parcel for parcel in batch if not self._refuses(parcel, held)]
        left_s = (EXPERTS_S + EXPERTS_ROW_S * sum(len(p.route_rows) for p in taken)) * self.process.slow
        while taken and left_s > 0:
            yield None, min(left_s, self._pulse_s)
            left_s -= self._pulse_s
            if left_s > 0:
                for end in self._links:
                    end.send(Pulse())
        if taken:
            self._tally.add(layer, torch.cat([parcel.route_experts for parcel in taken]))
        for parcel in taken:
            out = expert(layer, parcel.rows[parcel.route_rows], parcel.route_experts)  # [r, H]
            if parcel.route_weights is not None:
                out = sums(out, parcel.route_weights, parcel.route_rows, len(parcel.rows))
            carry(parcel.link, Answer(parcel.ticket, parcel.place, Reply(out)))

    def _refuses(self, parcel: Received, held: set[int]) -> bool:
        why = why_refused(parcel, self.process.member, self.oldest, held)
        if why is not None:
            carry(parcel.link, Answer(parcel.ticket, parcel.place, Refusal(*why)))
        return why is not None
